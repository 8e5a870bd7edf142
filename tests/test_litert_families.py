"""LiteRT: every family against transformers' eager output, at int8 near its reference, and in LiteRT-LM."""

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
from slm_export.exporters import litert
from slm_export.exporters.litert import LiteRTExporter
from slm_export.generation import Sampling, generate
from slm_export.graph.model import build_reference
from slm_export.runtime import DecoderSession, ExportOptions
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import EMBEDDING, GENERATION, rows
from slm_export.tokenization.tokenizer import SourceTokenizer

TOKENS = 60
PROMPT, GENERATED = "def save(family: Family", 20
QUICK = ("gemma-2", "mobilebert")


@dataclass(frozen=True)
class Model:
    folder: Path
    eager: Any
    checkpoint: Checkpoint


@pytest.fixture(autouse=True)
def one_prefill_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes seconds to convert; tests/test_litert.py has them all."""
    monkeypatch.setattr(litert, "PREFILLS", (16,))


@pytest.fixture(scope="module", params=families.chosen(families.DECODERS, QUICK))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder, family = tmp_path_factory.mktemp("family"), families.DECODERS[request.param]
    families.save(family, folder)
    families.save_tokenizer(folder)
    return Model(folder, families.eager(family, folder), load_checkpoint(folder))


def exported(checkpoint: Checkpoint, folder: Path) -> Any:
    exporter = LiteRTExporter()
    exporter.check(checkpoint)
    path = folder / Path(exporter.file(checkpoint.task)).name
    # An encoder gets a function per length: here one, which most inputs do not fill.
    context = 64 if checkpoint.task == GENERATION else 27
    options = ExportOptions(context, stop_ids=(families.STOP,), bos_id=1, tokenizer=folder)
    exporter.write(checkpoint, options, path)
    return exporter.open(path, checkpoint.task)


def read(session: DecoderSession, ids: Tensor) -> Tensor:
    return torch.stack([session.logits([token], at) for at, token in enumerate(ids[0].tolist())])


def test_a_decoder_unquantized_is_transformers_own(decoder: Model) -> None:
    """Token by token and in prompts of several lengths, beyond the sliding window where there is one."""
    ids = ids_of(TOKENS)
    with torch.no_grad():
        expected = decoder.eager(ids).logits[0]
    session = exported(WHOLE.run(decoder.checkpoint).checkpoint, decoder.folder)
    assert apart(read(session, ids), expected) <= UNQUANTIZED
    for length in (1, 2, 17, TOKENS):
        assert apart(session.logits(ids[0, :length].tolist(), 0), expected[length - 1]) <= UNQUANTIZED


def test_a_decoder_at_8_bits_is_its_reference_and_runs_in_litert_lm(decoder: Model) -> None:
    ids = ids_of(24)
    quantized = INT8.run(decoder.checkpoint).checkpoint
    with torch.no_grad():
        expected = build_reference(quantized, LiteRTExporter().rounding)(input_ids=ids).logits[0]
    session = exported(quantized, decoder.folder)
    assert apart(read(session, ids), expected) <= ROUNDING
    tokenizer = SourceTokenizer.load(decoder.folder)
    tokens = list(generate(session, tokenizer.encode(PROMPT), [families.STOP], GENERATED, Sampling()))
    path = decoder.folder / "model.litertlm"
    text = LiteRTExporter().generate(path, decoder.folder / "tokenizer.json", PROMPT, GENERATED, 0)
    assert text
    assert text == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", families.chosen(families.ENCODERS, QUICK))
def test_an_encoder_is_transformers_own_and_at_8_bits_its_reference(name: str, tmp_path: Path) -> None:
    family = families.ENCODERS[name]
    families.save(family, tmp_path)
    source, ids = load_checkpoint(tmp_path), ids_of(20)
    for recipe, bound in ((WHOLE, UNQUANTIZED), (INT8, ROUNDING)):
        checkpoint = recipe.run(source).checkpoint
        with torch.no_grad():
            expected = build_reference(checkpoint, LiteRTExporter().rounding)(ids, torch.ones_like(ids))[0]
        session = exported(checkpoint, tmp_path)
        for padding in (0, 5):
            got = session.outputs(ids[0].tolist() + [0] * padding, [1] * ids.shape[1] + [0] * padding)
            compared = [
                x if source.task == EMBEDDING else rows(source.task, x, ids.shape[1]) for x in (got, expected)
            ]
            assert apart(*compared) <= bound
