"""Two layers lowered and copied must be what all lowered layers are, to the bit; where they cannot, that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch

from slm_export.checkpoint import Checkpoint
from slm_export.exporters import executorch_lowering as lowering
from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.exporters.executorch_dialect import ExecuTorchDialect
from slm_export.graph.layers import CannotStamp, check_alike, layers_of
from slm_export.graph.model import build_decoder
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.source.load import load_checkpoint

LAYERS = 3
RECIPES = {
    "4 bits": GroupQuantize(bits=4, group=32, embedding_bits=4),
    "8 bits": GroupQuantize(bits=8, embedding_bits=8),
    "16 bits": GroupQuantize(bits=16, embedding_bits=16),
    "32 bits": GroupQuantize(bits=32, embedding_bits=32),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("deep")
    name, config, options = families.DECODERS["qwen-2.5"]  # has biases too
    families.save((name, config, {**options, "num_hidden_layers": LAYERS}), folder)
    return load_checkpoint(folder)


def stamps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets the reason of every lowering: None where two layers were enough."""
    reasons: list[Any] = []
    original = lowering.lower_decoder

    def noted(*args: Any) -> str | None:
        reasons.append(original(*args))
        return reasons[-1]

    monkeypatch.setattr(lowering, "lower_decoder", noted)
    return reasons


@pytest.mark.parametrize("width", families.chosen(RECIPES, ("4 bits",)))
def test_copied_layers_are_lowered_layers(
    width: str, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = RECIPES[width].run(source).checkpoint
    reasons = stamps(monkeypatch)
    copied = families.exported(checkpoint, tmp_path / "copied.pte")

    def refuse(checkpoint: Checkpoint) -> Any:
        raise CannotStamp("asked to lower every layer")

    monkeypatch.setattr(lowering, "layers_of", refuse)
    whole = families.exported(checkpoint, tmp_path / "whole.pte")
    assert reasons == [None, "asked to lower every layer"]
    ids = torch.randint(3, families.VOCABULARY, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    for length in (1, 2, 17, 50):
        assert torch.equal(copied.logits(ids[:length], 0), whole.logits(ids[:length], 0))
    for at, token in enumerate(ids):
        assert torch.equal(copied.logits([token], at), whole.logits([token], at))
    assert copied.metadata() == whole.metadata()


def test_the_layers_are_in_their_order(source: Checkpoint, tmp_path: Path) -> None:
    """Exchanging two layers changes what is computed; a copy that mixed them up would not notice."""
    names = [name for name in source.weights if ".layers.1." in name]
    other = {name: name.replace(".layers.1.", ".layers.2.") for name in names}
    swapped = source.with_weights(
        {name: source.weights[twin] for name, twin in other.items()}
        | {twin: source.weights[name] for name, twin in other.items()}
    )
    recipe = RECIPES["8 bits"]
    first = families.exported(recipe.run(source).checkpoint, tmp_path / "first.pte").logits([5, 6, 7], 0)
    second = families.exported(recipe.run(swapped).checkpoint, tmp_path / "second.pte").logits([5, 6, 7], 0)
    assert not torch.equal(first, second)


def test_layers_that_differ_are_not_copied(tmp_path: Path) -> None:
    name, config, options = families.DECODERS["gemma-3"]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    families.save((name, config, {**options, "layer_types": kinds}), tmp_path)
    checkpoint = RECIPES["8 bits"].run(load_checkpoint(tmp_path)).checkpoint
    ExecuTorchExporter().ready()
    module = build_decoder(checkpoint, ExecuTorchDialect(), context=32)
    with pytest.raises(CannotStamp, match="differs from layer 0"):
        check_alike(module, layers_of(checkpoint))


def test_fewer_than_three_layers_are_not_worth_it(tiny_llama: Path) -> None:
    with pytest.raises(CannotStamp, match="1 numbered layers"):
        layers_of(load_checkpoint(tiny_llama))
