"""ONNX: every family of encoders against transformers' own output, and at int8 near its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import INT8, ROUNDING, UNQUANTIZED, WHOLE, apart, ids_of

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.onnx import OnnxExporter
from slm_export.exporters.onnx_dialect import onnxruntime_rounding
from slm_export.graph.model import build_reference
from slm_export.runtime import EncoderSession, ExportOptions
from slm_export.source import tasks
from slm_export.source.load import load_checkpoint

QUANTIZED = ("bert, masks", "distilbert, answers", "albert", "mobilebert")
"""A tied head, two scores of a token, layers that share weights, and the one of three tokens at least."""


def exported(checkpoint: Checkpoint, folder: Path) -> Any:
    exporter = OnnxExporter()
    exporter.check(checkpoint)
    exporter.write(checkpoint, ExportOptions(context=64), folder / "model.onnx")
    return exporter.open(folder / "model.onnx", checkpoint.task)


@pytest.mark.parametrize("name", families.chosen(families.ENCODERS, ("bert, masks",)))
def test_an_encoder_unquantized_is_transformers_own(name: str, tmp_path: Path) -> None:
    """Of several lengths, and with padding that must not be seen."""
    family = families.ENCODERS[name]
    families.save(family, tmp_path)
    eager, checkpoint = families.eager(family, tmp_path), load_checkpoint(tmp_path)
    session = exported(WHOLE.run(checkpoint).checkpoint, tmp_path)
    assert isinstance(session, EncoderSession)
    reference: Any = build_reference(checkpoint)
    pad = getattr(checkpoint.config, "pad_token_id", None) or 0
    for length, padding in ((1, 0), (2, 0), (7, 3), (40, 8)):
        ids = ids_of(length)
        with torch.no_grad():
            output = eager(ids, attention_mask=torch.ones_like(ids))
            if checkpoint.task == tasks.EMBEDDING:
                expected = reference.pooling(output[0], torch.ones_like(ids))[0]
            else:
                expected = tasks.scores(checkpoint.task, output)[0]
        padded, mask = [*ids[0].tolist(), *[pad] * padding], [1] * length + [0] * padding
        got = tasks.rows(checkpoint.task, session.outputs(padded, mask), length)
        assert apart(got, tasks.rows(checkpoint.task, expected, length)) <= UNQUANTIZED


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_encoder_at_8_bits_is_its_reference(name: str, tmp_path: Path) -> None:
    families.save(families.ENCODERS[name], tmp_path)
    quantized = INT8.run(load_checkpoint(tmp_path)).checkpoint
    reference = build_reference(quantized, onnxruntime_rounding)
    session = exported(quantized, tmp_path)
    ids = ids_of(40)
    with torch.no_grad():
        expected = reference(ids, torch.ones_like(ids))[0]
    assert apart(session.outputs(ids[0].tolist(), [1] * 40), expected) <= ROUNDING
