"""Activation-aware scaling: the same function before rounding, less error after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_models
import torch
import transformers
from small_models import divergence, logits, random_text, saved

from slm_export.checkpoint import Checkpoint
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.optimizers.awq import Awq
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.recipe import unaccounted

TEXT = random_text()
WORK = Workbench(calibration=TEXT)


def uneven(folder: Path, family: str = "Llama", **options: object) -> Checkpoint:
    """A model whose norms let a few channels through with many times the size of the others."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**small_models.LLAMA, "pad_token_id": 0, **options})
    module = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 and "layernorm" in name:
            parameter.data[::9] *= 12
    return saved(module, folder)


@pytest.mark.parametrize(
    ("family", "options", "scaled"),
    [
        ("Llama", {}, 6),  # of four inputs a layer all but that of o_proj, whose heads are shared
        ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}, 8),
        ("Gemma", {"head_dim": 16}, 6),
        ("Phi", {"num_key_value_heads": 4}, 4),  # a LayerNorm; behind GELU nothing can be folded
        ("Olmo2", {}, 2),  # norms lie behind the blocks' parts: only up and down are neighbours
    ],
)
def test_the_model_computes_the_same(family, options, scaled, tmp_path):
    source = uneven(tmp_path, family, **options)
    result = Awq().run(source, WORK)
    assert unaccounted(source, result.checkpoint, result.skipped) == []
    expected, got = logits(source, TEXT), logits(result.checkpoint, TEXT)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert result.notes[0].startswith(f"{scaled} of ")


def test_rounding_costs_less_afterwards(tmp_path):
    source = uneven(tmp_path)
    rounding = GroupQuantize(bits=8, embedding_bits=32)
    scaled = Awq(bits=8).run(source, WORK).checkpoint
    plain, better = rounding.run(source).checkpoint, rounding.run(scaled).checkpoint
    assert divergence(source, better, TEXT) < 0.8 * divergence(source, plain, TEXT)


def test_an_encoder_with_norms_behind_its_parts_is_left_as_it_is(tmp_path):
    """BERT's norms feed the residual stream too: divided there, the block would give something else."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    source = saved(transformers.BertModel(transformers.BertConfig(vocab_size=128, **sizes)), tmp_path)
    result = Awq().run(source, WORK)
    # Value and output are neighbours in BERT, with as many heads on both sides.
    assert all(
        "value" in name or "output.dense" in name
        for name in result.checkpoint.weights
        if name not in result.skipped
    )


def test_a_model_that_is_no_sequence_is_left_and_that_is_said(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.AlbertConfig(vocab_size=50, embedding_size=32, **sizes)
    source = saved(transformers.AlbertModel(config), tmp_path)
    result = Awq().run(source, WORK)
    assert result.notes[0].startswith("no channel was scaled: its blocks are not run")
    assert unaccounted(source, result.checkpoint, result.skipped) == []


def test_what_is_quantized_already_is_refused(tmp_path):
    with pytest.raises(InputError, match="quantized already; put this pass before"):
        Awq().run(GroupQuantize().run(small_models.llama(tmp_path)).checkpoint, WORK)


@pytest.mark.parametrize("options", [{"bits": 16}, {"group": 48}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(InputError, match=r"^awq: "):
        Awq(**options)
