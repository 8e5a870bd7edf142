"""Every family against transformers' eager output: unquantized within 1e-3 of the range, int8 near its reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from slm_export import tasks
from slm_export.checkpoint import Checkpoint
from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.generation import Sampling, generate
from slm_export.load import load_checkpoint
from slm_export.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.runtime import DecoderSession, EncoderSession, ExportOptions
from slm_export.runtime_tokenizers import ExecuTorchTokenizer
from slm_export.tokenizer import SourceTokenizer

TOKENS = 60
STOP = 2
PROMPT, GENERATED = "def save(family: Family", 30
UNQUANTIZED = 1e-3
ROUNDING = 0.03
"""Share of the range that int8 activations may differ by where two roundings fall on either side of an edge."""

WHOLE = GroupQuantize(bits=32, embedding_bits=32)
INT8 = GroupQuantize(bits=8, embedding_bits=8)


@dataclass(frozen=True)
class Decoder:
    name: str
    folder: Path
    model: Any
    checkpoint: Checkpoint


@pytest.fixture(scope="module", params=families.DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("family")
    family = families.DECODERS[request.param]
    families.save(family, folder)
    families.save_tokenizer(folder)
    return Decoder(request.param, folder, families.eager(family, folder), load_checkpoint(folder))


def session_of(checkpoint: Checkpoint, folder: Path) -> Any:
    exporter = ExecuTorchExporter()
    exporter.ready()
    exporter.check(checkpoint)
    path = folder / "model.pte"
    exporter.write(checkpoint, ExportOptions(context=64, stop_ids=(STOP,), bos_id=1), path)
    return exporter.open(path, checkpoint.task)


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / (expected.max() - expected.min()))


def ids_of(count: int) -> Tensor:
    return torch.randint(3, families.VOCABULARY, (1, count), generator=torch.Generator().manual_seed(5))


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
    tokens = list(generate(session, prompt, [STOP], GENERATED, Sampling()))
    if len(tokens) < GENERATED:
        tokens.append(STOP)
    return ExecuTorchTokenizer(folder).decode(tokens)


def test_a_decoder_unquantized_is_transformers_own(decoder: Decoder) -> None:
    """Token by token and in prompts of several lengths, beyond the sliding window where there is one."""
    assert families.WINDOW < TOKENS
    ids = ids_of(TOKENS)
    with torch.no_grad():
        expected = decoder.model(ids).logits[0]
    session = session_of(WHOLE.run(decoder.checkpoint).checkpoint, decoder.folder)
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
        expected = build_reference(quantized, quantize_activations=True)(input_ids=ids).logits[0]
    session = session_of(quantized, decoder.folder)
    assert apart(read(session, ids), expected) <= ROUNDING
    text = runner_text(decoder.folder)
    assert text
    assert text == text_of(session, decoder.folder)


@pytest.mark.parametrize("name", families.ENCODERS)
def test_an_encoder_unquantized_is_transformers_own(name: str, tmp_path: Path) -> None:
    """Of several lengths, and with padding that must not be seen."""
    family = families.ENCODERS[name]
    families.save(family, tmp_path)
    model = families.eager(family, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    session = session_of(WHOLE.run(checkpoint).checkpoint, tmp_path)
    assert isinstance(session, EncoderSession)
    reference: Any = build_reference(checkpoint)
    pad = family[2].get("pad_token_id", 0)
    for length, padding in ((2, 0), (7, 3), (40, 8)):
        ids = ids_of(length)
        with torch.no_grad():
            output = model(ids, attention_mask=torch.ones_like(ids))
            if checkpoint.task == tasks.EMBEDDING:
                expected = reference.pooling(output[0], torch.ones_like(ids))[0]
            else:
                expected = tasks.scores(checkpoint.task, output)[0]
        padded, mask = [*ids[0].tolist(), *[pad] * padding], [1] * length + [0] * padding
        got = tasks.rows(checkpoint.task, session.outputs(padded, mask), length)
        assert apart(got, tasks.rows(checkpoint.task, expected, length)) <= UNQUANTIZED


@pytest.mark.parametrize("name", families.ENCODERS)
def test_an_encoder_at_8_bits_is_its_reference(name: str, tmp_path: Path) -> None:
    families.save(families.ENCODERS[name], tmp_path)
    quantized = INT8.run(load_checkpoint(tmp_path)).checkpoint
    session = session_of(quantized, tmp_path)
    assert isinstance(session, EncoderSession)
    ids = ids_of(24)
    with torch.no_grad():
        expected = build_reference(quantized, quantize_activations=True)(ids, torch.ones_like(ids))[0]
    got = session.outputs(ids[0].tolist(), [1] * 24)
    assert apart(got, expected) <= ROUNDING


def test_layers_that_share_weights_are_stored_once(tmp_path: Path) -> None:
    family = families.ENCODERS["albert"]
    families.save(family, tmp_path)
    checkpoint = WHOLE.run(load_checkpoint(tmp_path)).checkpoint
    session_of(checkpoint, tmp_path)
    # One layer's matrices more would be a tenth of the file or so; the graph itself takes some tens of kB.
    assert (tmp_path / "model.pte").stat().st_size < checkpoint.bytes + 120_000


def test_token_types_tell_question_from_passage(tmp_path: Path) -> None:
    family = ("BertForQuestionAnswering", "BertConfig", families.ENCODERS["bert"][2])
    families.save(family, tmp_path)
    session = session_of(WHOLE.run(load_checkpoint(tmp_path)).checkpoint, tmp_path)
    ids, types = ids_of(20), torch.tensor([[0] * 8 + [1] * 12])
    with torch.no_grad():
        output = families.eager(family, tmp_path)(ids, token_type_ids=types)
        expected = tasks.scores(tasks.ANSWERING, output)[0]
    assert isinstance(session, EncoderSession)
    got = session.outputs(ids[0].tolist(), [1] * 20, types[0].tolist())
    assert apart(got, expected) <= UNQUANTIZED
    assert apart(session.outputs(ids[0].tolist(), [1] * 20), expected) > UNQUANTIZED
