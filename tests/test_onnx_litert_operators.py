"""What a format cannot express is refused by name before work begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import planted
import pytest
from conftest import environment

from slm_export.errors import InputError
from slm_export.graph import model
from slm_export.registry import exporter
from slm_export.source.load import load_checkpoint

FORMATS = ("litert", "onnx")


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_ends_with_2_before_any_weight_is_read(
    format: str, tiny_llama: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(Path(planted.__file__)), str(tiny_llama), "--target", "linux"]
    done = subprocess.run(
        [*command, "--format", format, "--out", "out"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(
        f"error: {format} has no operator for {planted.NAME}; choose another --format\n"
    )
    assert "check every weight" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", [families.ENCODERS["bert"], families.ENCODERS["flaubert"]])
def test_an_encoders_operator_is_named(
    format: str, family: families.Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    families.save(family, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    made = exporter(format)
    made.check(checkpoint)
    monkeypatch.setattr(torch.nn.functional, "gelu", torch.ops.slm_test.odd)
    monkeypatch.setattr("transformers.activations.GELUActivation.forward", planted.Odd.forward)
    with pytest.raises(InputError, match=f"{format} has no operator for {planted.NAME}"):
        made.check(checkpoint)


@pytest.mark.parametrize("format", FORMATS)
def test_values_narrower_than_their_keys_are_refused(
    format: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register: Any = model._register_attention
    checkpoint = load_checkpoint(tiny_llama)

    def narrow() -> None:
        from transformers import AttentionInterface

        register()
        AttentionInterface.register(model._CACHED, planted.attend_to_half)

    monkeypatch.setattr(model, "_register_attention", narrow)
    with pytest.raises(InputError, match=f"keys and values differ in width cannot be exported to {format}"):
        exporter(format).check(checkpoint)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name", families.chosen((*families.DECODERS, *families.ENCODERS), ("gemma-3", "flaubert"))
)
def test_no_family_is_refused(format: str, name: str, tmp_path: Path) -> None:
    families.save({**families.DECODERS, **families.ENCODERS}[name], tmp_path)
    exporter(format).check(load_checkpoint(tmp_path))
