"""A vocabulary that serves twice lies in the file once, and the program computes what it did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from slm_export.checkpoint import Checkpoint
from slm_export.exporters import executorch_lowering as lowering
from slm_export.exporters.executorch_stand_in import constants_of
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.source.load import load_checkpoint

RECIPES = {
    "4 bits": GroupQuantize(bits=4, group=32, embedding_bits=4),
    "8 bits": GroupQuantize(bits=8, embedding_bits=8),
}
IDS = torch.randint(3, families.VOCABULARY, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def checkpoint(folder: Path, recipe: str, *, tied: bool) -> Checkpoint:
    name, config, options = families.DECODERS["qwen-2.5"]
    families.save((name, config, {**options, "num_hidden_layers": 1, "tie_word_embeddings": tied}), folder)
    return RECIPES[recipe].run(load_checkpoint(folder)).checkpoint


def as_emitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(emitted: Path, path: Path, contents: Any, alignment: int) -> None:
        shutil.copy(emitted, path)

    monkeypatch.setattr(lowering, "write_program", copy)


@pytest.mark.parametrize("recipe", families.chosen(RECIPES, ("4 bits",)))
def test_a_tied_vocabulary_is_stored_once(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "model", recipe, tied=True)
    (head,) = model.tied.values()
    codes = next(constants_of(model.weights[head]))[1]
    once = families.exported(model, tmp_path / "once.pte")
    as_emitted(monkeypatch)
    twice = families.exported(model, tmp_path / "twice.pte")
    files = [(tmp_path / name).read_bytes() for name in ("once.pte", "twice.pte")]
    assert [file.count(codes) for file in files] == [1, 2]
    assert len(codes) <= len(files[1]) - len(files[0]) < len(codes) + 1024
    for at, token in enumerate(IDS):
        assert torch.equal(once.logits([token], at), twice.logits([token], at))
    assert torch.equal(once.logits(IDS, 0), twice.logits(IDS, 0))
    assert contents(files[0]) == contents(files[1])


@pytest.mark.parametrize("recipe", families.chosen(RECIPES, ("4 bits",)))
def test_another_head_is_left_alone(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(tmp_path / "model", recipe, tied=False)
    families.exported(model, tmp_path / "shared.pte")
    as_emitted(monkeypatch)
    families.exported(model, tmp_path / "plain.pte")
    assert (tmp_path / "shared.pte").read_bytes() == (tmp_path / "plain.pte").read_bytes()


def test_the_runtime_finds_nothing_wrong_with_it(tmp_path: Path) -> None:
    from executorch.runtime import Runtime, Verification

    path = tmp_path / "model.pte"
    families.exported(checkpoint(tmp_path / "model", "8 bits", tied=True), path)
    program = Runtime.get().load_program(str(path), verification=Verification.InternalConsistency)
    assert program.load_method("forward") is not None


def contents(program: bytes) -> Any:
    """What ExecuTorch's own reader finds: constant tensors, and constants by name."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = deserialize_pte_binary(program)
    assert file.named_data is not None
    named = {key: file.named_data.buffers[e.buffer_index] for key, e in file.named_data.pte_data.items()}
    return [buffer.storage for buffer in file.program.constant_buffer], named
