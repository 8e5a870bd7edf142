"""ONNX: every family of decoders against transformers' eager output, at int8 near its reference, and in genai."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import INT8, ROUNDING, UNQUANTIZED, WHOLE, apart, ids_of
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.onnx import OnnxExporter
from slm_export.exporters.onnx_dialect import onnxruntime_rounding
from slm_export.generation import Sampling, generate
from slm_export.graph.model import build_reference
from slm_export.runtime import DecoderSession, ExportOptions
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer

TOKENS = 60
PROMPT, GENERATED = "def save(family: Family", 30
QUICK = ("gemma-2", "gpt-2")


@dataclass(frozen=True)
class Model:
    folder: Path
    eager: Any
    checkpoint: Checkpoint


def made(family: families.Family, folder: Path) -> Model:
    families.save(family, folder)
    families.save_tokenizer(folder)
    return Model(folder, families.eager(family, folder), load_checkpoint(folder))


@pytest.fixture(scope="module", params=families.chosen(families.DECODERS, QUICK))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made(families.DECODERS[request.param], tmp_path_factory.mktemp("family"))


def exported(checkpoint: Checkpoint, folder: Path) -> Any:
    exporter = OnnxExporter()
    exporter.check(checkpoint)
    options = ExportOptions(context=64, stop_ids=(families.STOP,), bos_id=1)
    exporter.write(checkpoint, options, folder / "model.onnx")
    return exporter.open(folder / "model.onnx", checkpoint.task)


def read(session: DecoderSession, ids: Tensor) -> Tensor:
    return torch.stack([session.logits([token], at) for at, token in enumerate(ids[0].tolist())])


def genai_text(folder: Path) -> str:
    return OnnxExporter().generate(folder / "model.onnx", folder / "tokenizer.json", PROMPT, GENERATED, 0)


def text_of(session: DecoderSession, folder: Path) -> str:
    """Return what our own loop writes; the stop token is no text in onnxruntime-genai."""
    prompt = SourceTokenizer.load(folder).encode(PROMPT)
    tokens = list(generate(session, prompt, [families.STOP], GENERATED, Sampling()))
    tokenizer = OnnxExporter().open_tokenizer(
        folder / "model.onnx", folder / "tokenizer.json", "text-generation"
    )
    assert tokenizer is not None
    return tokenizer.decode(tokens)


def test_a_decoder_unquantized_is_transformers_own(decoder: Model) -> None:
    """Token by token and in prompts of several lengths, beyond the sliding window where there is one."""
    assert families.WINDOW < TOKENS
    ids = ids_of(TOKENS)
    with torch.no_grad():
        expected = decoder.eager(ids).logits[0]
    session = exported(WHOLE.run(decoder.checkpoint).checkpoint, decoder.folder)
    assert apart(read(session, ids), expected) <= UNQUANTIZED
    for length in (1, 2, 17, TOKENS):
        assert apart(session.logits(ids[0, :length].tolist(), 0), expected[length - 1]) <= UNQUANTIZED
    session.logits(ids[0, :30].tolist(), 0)
    assert apart(session.logits(ids[0, 30:].tolist(), 30), expected[-1]) <= UNQUANTIZED


def test_a_decoder_at_8_bits_is_its_reference_and_runs_in_genai(decoder: Model) -> None:
    ids = ids_of(24)
    quantized = INT8.run(decoder.checkpoint).checkpoint
    with torch.no_grad():
        expected = build_reference(quantized, onnxruntime_rounding)(input_ids=ids).logits[0]
    session = exported(quantized, decoder.folder)
    assert apart(read(session, ids), expected) <= ROUNDING
    text = genai_text(decoder.folder)
    assert text
    assert text == text_of(session, decoder.folder)
