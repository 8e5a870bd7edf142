"""Every family of decoders against transformers' eager output: unquantized, and at int8 near its reference."""

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
from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.exporters.executorch_dialect import xnnpack_rounding
from slm_export.generation import Sampling, generate
from slm_export.graph.model import build_reference
from slm_export.runtime import DecoderSession
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.runtime_tokenizers import ExecuTorchTokenizer
from slm_export.tokenization.tokenizer import SourceTokenizer

TOKENS = 60
PROMPT, GENERATED = "def save(family: Family", 30


@dataclass(frozen=True)
class Decoder:
    name: str
    folder: Path
    model: Any
    checkpoint: Checkpoint


@pytest.fixture(scope="module", params=families.chosen(families.DECODERS, ("gemma-2",)))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("family")
    family = families.DECODERS[request.param]
    families.save(family, folder)
    families.save_tokenizer(folder)
    return Decoder(request.param, folder, families.eager(family, folder), load_checkpoint(folder))


def read(session: DecoderSession, ids: Tensor) -> Tensor:
    return torch.stack([session.logits([token], at) for at, token in enumerate(ids[0].tolist())])


def runner_text(folder: Path) -> str:
    """Return what ExecuTorch's own generation loop writes."""
    exporter = ExecuTorchExporter()
    return exporter.generate(folder / "model.pte", folder / "tokenizer.json", PROMPT, GENERATED, 0)


def text_of(session: DecoderSession, folder: Path) -> str:
    """Return what our own writes, a stop token included, since the runner prints that too."""
    tokenizer = SourceTokenizer.load(folder)
    prompt = tokenizer.encode(PROMPT)
    tokens = list(generate(session, prompt, [families.STOP], GENERATED, Sampling()))
    if len(tokens) < GENERATED:
        tokens.append(families.STOP)
    return ExecuTorchTokenizer(folder).decode(tokens)


def test_a_decoder_unquantized_is_transformers_own(decoder: Decoder) -> None:
    """Token by token and in prompts of several lengths, beyond the sliding window where there is one."""
    assert families.WINDOW < TOKENS
    ids = ids_of(TOKENS)
    with torch.no_grad():
        expected = decoder.model(ids).logits[0]
    session = families.exported(WHOLE.run(decoder.checkpoint).checkpoint, decoder.folder / "model.pte")
    assert isinstance(session, DecoderSession)
    assert apart(read(session, ids), expected) <= UNQUANTIZED
    for length in (1, 2, 17, TOKENS):
        assert apart(session.logits(ids[0, :length].tolist(), 0), expected[length - 1]) <= UNQUANTIZED
    session.logits(ids[0, :30].tolist(), 0)
    assert apart(session.logits(ids[0, 30:].tolist(), 30), expected[-1]) <= UNQUANTIZED


def test_a_decoder_at_8_bits_is_its_reference(decoder: Decoder) -> None:
    ids = ids_of(24)
    quantized = INT8.run(decoder.checkpoint).checkpoint
    with torch.no_grad():
        expected = build_reference(quantized, xnnpack_rounding)(input_ids=ids).logits[0]
    session = families.exported(quantized, decoder.folder / "model.pte")
    assert apart(read(session, ids), expected) <= ROUNDING
    text = runner_text(decoder.folder)
    assert text
    assert text == text_of(session, decoder.folder)
