"""What an exporter writes is the model, to the last digit, however much rounding would hide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.fidelity.exactness import LIMIT, judge_exact
from slm_export.fidelity.miniature import NEURONS, TOKENS, WINDOW, miniature
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.registry import exporter
from slm_export.runtime import ExportOptions
from slm_export.source.load import load_checkpoint

EXACT = ("onnx", "executorch", "litert")
FAMILIES = {**families.DECODERS, **families.ENCODERS}


def saved(name: str, folder: Path) -> Checkpoint:
    families.save(FAMILIES[name], folder)
    return load_checkpoint(folder)


def scores(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = build_reference(checkpoint)(input_ids=ids, use_cache=False).logits
    return output


def test_a_miniature_is_small_and_has_the_models_numbers(pycode: Path) -> None:
    source = load_checkpoint(pycode)
    small = miniature(GroupQuantize(bits=8).run(source).checkpoint)
    assert small.config.num_hidden_layers == 1
    assert small.weights["model.embed_tokens.weight"].shape == (TOKENS, 256)
    assert small.weights["model.layers.0.mlp.gate_proj.weight"].shape == (NEURONS, 256)
    assert small.weights["model.layers.0.mlp.down_proj.weight"].shape == (256, NEURONS)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(small.weights[name].float32(), source.weights[name].float32(), atol=0.02)
    assert scores(small, torch.tensor([[9, 8, 7]])).shape == (1, 3, TOKENS)
    assert source.config.num_hidden_layers == 6  # the model's own configuration is as it was


@pytest.mark.parametrize(
    ("family", "layers"), [("smollm-3", 2), ("gemma-2", 2), ("llama-3.2", 1), ("albert", 2)]
)
def test_a_miniature_has_every_kind_of_layer(family: str, layers: int, tmp_path: Path) -> None:
    small = miniature(saved(family, tmp_path))
    assert small.config.num_hidden_layers == layers


def test_a_short_text_outgrows_the_window_of_a_miniature(tmp_path: Path) -> None:
    name, config, options = families.DECODERS["mistral"]
    families.save((name, config, {**options, "sliding_window": 4096, "pad_token_id": None}), tmp_path)
    assert miniature(load_checkpoint(tmp_path)).config.sliding_window == WINDOW < 64


def test_ids_that_a_miniature_lacks_are_not_its_padding(tmp_path: Path) -> None:
    name, config, options = families.DECODERS["llama-3.2"]
    families.save((name, config, {**options, "vocab_size": 1024, "pad_token_id": 900}), tmp_path)
    small = miniature(load_checkpoint(tmp_path))
    assert small.config.vocab_size == TOKENS
    assert scores(small, torch.tensor([[9, 511]])).isfinite().all()


@pytest.mark.parametrize("name", families.chosen(FAMILIES, ("gemma",)))
@pytest.mark.parametrize("format", EXACT)
def test_every_family_is_exact(name: str, format: str, tmp_path: Path, pycode: Path) -> None:
    made = exporter(format)
    made.ready()
    check = judge_exact(made, saved(name, tmp_path), pycode)
    assert check.passed, check
    assert check.value is not None
    assert check.value < LIMIT / 10  # a good one is nowhere near the limit


@pytest.mark.parametrize("positions", [16, 40])
def test_a_model_of_few_positions_is_read_to_its_end(positions: int, tmp_path: Path, pycode: Path) -> None:
    name, config, options = families.DECODERS["gpt-2"]
    families.save((name, config, {**options, "n_positions": positions}), tmp_path)
    made = exporter("onnx")
    made.ready()
    check = judge_exact(made, load_checkpoint(tmp_path), pycode)
    assert check.passed, check


class Careless:
    """An exporter that writes another model than it was given."""

    def __init__(self, made: Any, **config: Any) -> None:
        self._made, self._config = made, config

    def write(self, checkpoint: Checkpoint, options: ExportOptions, path: Path) -> object:
        other = type(checkpoint.config).from_dict({**checkpoint.config.to_dict(), **self._config})
        return self._made.write(replace(checkpoint, config=other), options, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


@pytest.mark.parametrize(
    ("mistake", "place"),
    [
        pytest.param(
            {"rms_norm_eps": 1e-5}, "after 19 tokens, and outside of the layers", marks=pytest.mark.slow
        ),
        ({"hidden_act": "gelu"}, "after 19 tokens, and in model.layers.0.mlp or its norm"),
        ({"sliding_window": WINDOW + 1}, "after 33 tokens, and in model.layers.0.self_attn or its norm"),
    ],
    ids=str,
)
def test_a_mistake_that_rounding_would_hide_is_seen_and_located(
    mistake: dict[str, Any], place: str, tmp_path: Path, pycode: Path
) -> None:
    name, config, options = families.DECODERS["mistral"]
    told = {**options, "rms_norm_eps": 2e-6, "hidden_act": "gelu_pytorch_tanh", "sliding_window": WINDOW}
    families.save((name, config, told), tmp_path)
    made = exporter("onnx")
    made.ready()
    check = judge_exact(Careless(made, **mistake), load_checkpoint(tmp_path), pycode)  # type: ignore[arg-type]
    assert not check.passed, check
    assert place in check.detail, check
