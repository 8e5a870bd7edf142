"""Every family of encoders against transformers' own output: unquantized and int8, every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import INT8, ROUNDING, UNQUANTIZED, WHOLE, apart, ids_of

from slm_export.exporters.executorch_dialect import xnnpack_rounding
from slm_export.graph.model import build_reference
from slm_export.runtime import EncoderSession
from slm_export.source import tasks
from slm_export.source.load import load_checkpoint

QUICK = ("distilbert, answers",)


@pytest.mark.parametrize("name", families.chosen(families.ENCODERS, QUICK))
def test_an_encoder_unquantized_is_transformers_own(name: str, tmp_path: Path) -> None:
    """Of several lengths, and with padding that must not be seen."""
    family = families.ENCODERS[name]
    families.save(family, tmp_path)
    model = families.eager(family, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    session = families.exported(WHOLE.run(checkpoint).checkpoint, tmp_path / "model.pte")
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


@pytest.mark.parametrize("name", families.chosen(families.ENCODERS, QUICK))
def test_an_encoder_at_8_bits_is_its_reference(name: str, tmp_path: Path) -> None:
    families.save(families.ENCODERS[name], tmp_path)
    quantized = INT8.run(load_checkpoint(tmp_path)).checkpoint
    session = families.exported(quantized, tmp_path / "model.pte")
    assert isinstance(session, EncoderSession)
    ids = ids_of(24)
    with torch.no_grad():
        expected = build_reference(quantized, xnnpack_rounding)(ids, torch.ones_like(ids))[0]
    got = session.outputs(ids[0].tolist(), [1] * 24)
    assert apart(got, expected) <= ROUNDING


def test_layers_that_share_weights_are_stored_once(tmp_path: Path) -> None:
    family = families.ENCODERS["albert"]
    families.save(family, tmp_path)
    checkpoint = WHOLE.run(load_checkpoint(tmp_path)).checkpoint
    families.exported(checkpoint, tmp_path / "model.pte")
    # One layer's matrices more would be a tenth of the file or so; the graph itself takes some tens of kB.
    assert (tmp_path / "model.pte").stat().st_size < checkpoint.bytes + 120_000


def test_token_types_tell_question_from_passage(tmp_path: Path) -> None:
    family = ("BertForQuestionAnswering", "BertConfig", families.ENCODERS["bert"][2])
    families.save(family, tmp_path)
    session = families.exported(WHOLE.run(load_checkpoint(tmp_path)).checkpoint, tmp_path / "model.pte")
    ids, types = ids_of(20), torch.tensor([[0] * 8 + [1] * 12])
    with torch.no_grad():
        output = families.eager(family, tmp_path)(ids, token_type_ids=types)
        expected = tasks.scores(tasks.ANSWERING, output)[0]
    assert isinstance(session, EncoderSession)
    got = session.outputs(ids[0].tolist(), [1] * 20, types[0].tolist())
    assert apart(got, expected) <= UNQUANTIZED
    assert apart(session.outputs(ids[0].tolist(), [1] * 20), expected) > UNQUANTIZED
