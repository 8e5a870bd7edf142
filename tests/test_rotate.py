"""Rotations folded into weights: the same logits, evener channels, and families that do not permit them refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from checkpoints import dense
from small_models import logits, random_text, saved

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.rotate import Rotate, hadamard
from slm_export.recipe import unaccounted

TEXT = random_text(windows=8)
SIZES: dict[str, Any] = {**small_models.LLAMA, "pad_token_id": 0}


def model(family: str, folder: Path, **options: Any) -> Checkpoint:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    return saved(getattr(transformers, f"{family}ForCausalLM")(config), folder)


FAMILIES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Phi3": {},
    "Gemma": {"head_dim": 16},
}


@pytest.mark.parametrize("rotations", [{"values": False}, {"stream": False}, {}])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_the_same(family, rotations, tmp_path):
    source = model(family, tmp_path, **FAMILIES[family])
    result = Rotate(untie=True, **rotations).run(source)
    rotated = result.checkpoint
    assert unaccounted(source, rotated, result.skipped) == []
    expected, got = logits(source, TEXT), logits(rotated, TEXT)
    # Two products more for each that there was: float32's error, a few times over.
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    matrices = [
        name for name, role in source.roles.items() if role == "linear" and name not in result.skipped
    ]
    assert matrices
    for name in matrices:
        assert not torch.allclose(rotated.weights[name].float32(), source.weights[name].float32(), atol=1e-2)


def test_a_tied_model_is_untied_only_if_asked(tmp_path):
    source = small_models.llama(tmp_path, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"ties its head to its embedding.*untie = true"):
        Rotate().run(source)
    rotated = Rotate(untie=True).run(source).checkpoint
    assert not rotated.tied
    assert rotated.roles["lm_head.weight"] == "head"
    assert source.config.tie_word_embeddings
    expected = logits(source, TEXT)
    assert (logits(rotated, TEXT) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert Rotate(stream=False).run(source).checkpoint.tied


def test_an_outlying_channel_is_spread_over_all(tmp_path):
    source = small_models.llama(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    values = source.weights[name].float32().clone()
    values[5] *= 50
    rotated = Rotate(values=False).run(source.with_weights({name: dense(values)})).checkpoint
    largest = rotated.weights[name].float32().abs().amax(1)
    assert largest.max() < 4 * largest.median() < values.abs().amax(1).max()


@pytest.mark.parametrize(
    ("family", "options"), [("Gemma2", {"head_dim": 16}), ("Olmo2", {}), ("Phi", {}), ("GPT2", {})]
)
def test_a_family_that_does_not_permit_it_is_refused(family, options, tmp_path):
    if family == "GPT2":
        config = transformers.GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4)
        source = saved(transformers.GPT2LMHeadModel(config), tmp_path)
    else:
        source = model(family, tmp_path, **options)
    with pytest.raises(InputError, match="computes something else when rotated"):
        Rotate(untie=True, values=False).run(source)


@pytest.mark.parametrize("width", [1, 2, 64, 96, 36, 15])
def test_the_rotation_is_orthogonal_and_random(width):
    made = hadamard(width, torch.Generator().manual_seed(1))
    assert torch.allclose(made @ made.t(), torch.eye(width), atol=1e-5)
    if width > 2:
        assert not torch.equal(made, hadamard(width, torch.Generator().manual_seed(2)))


def test_a_power_of_two_mixes_all_channels_evenly():
    made = hadamard(64, torch.Generator().manual_seed(1))
    assert torch.allclose(made.abs(), torch.full((64, 64), 1 / 8))


def test_what_is_quantized_already_is_refused(tmp_path):
    with pytest.raises(InputError, match="quantized already; put this pass before"):
        Rotate().run(GroupQuantize().run(small_models.llama(tmp_path)).checkpoint)


def test_nothing_to_do_is_refused(tmp_path):
    with pytest.raises(InputError, match="stream and values are both false"):
        Rotate(stream=False, values=False).run(small_models.llama(tmp_path))
