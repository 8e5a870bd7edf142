"""A client, message by message, on a small model: what it sends, what it keeps to itself, and when it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from federating import federation
from flwr.app import ConfigRecord, Context, Message, RecordDict

from slm_export.federated.accounting import Budget, Ledger
from slm_export.federated.base import open_base, start
from slm_export.federated.client import (
    BUDGET_SPENT,
    CANNOT_LEARN,
    LEDGER,
    OTHER_SETTINGS,
    Station,
    _base,
    _examples,
    answer,
)
from slm_export.federated.settings import Federation
from slm_export.federated.updates import ARRAYS, CONFIG, Sent, Tensors, norm_of, screen, to_record
from slm_export.source.provenance import source_sha256

SECRET = "the-user@example.org"
TEXT = "".join(f"def function_{i}(value):\n    return value * {i} + {i % 7}\n\n" for i in range(60))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text(f"# write to {SECRET}\n{TEXT}")
    return path


def settings(tmp_path: Path, model: Path, texts: Path, **tables: Any) -> Federation:
    data = {"texts": (str(texts),)} | tables.pop("data", {})
    local = {"steps": 2, "batch": 2, "length": 32, "rate": 0.01}
    return federation(
        tmp_path,
        model={"base": str(model), "rank": 2},
        data=data,
        local=local,
        **({"rounds": {"number": 4}} | tables),
    )


@pytest.fixture(scope="module")
def begun(tiny_llama: Path) -> Tensors:
    return start(open_base(federation(tiny_llama, model={"base": str(tiny_llama), "rank": 2}).model))


def asked(made: Federation, tensors: Tensors, number: int = 1, **other: str) -> Message:
    base = source_sha256(Path(made.model.base))
    config = {"settings": made.sha256, "base": base, "server-round": number, "nonce": "n" * 32} | other
    message = Message(
        RecordDict({ARRAYS: to_record(tensors), CONFIG: ConfigRecord(config)}),
        dst_node_id=7,
        message_type="train",
    )
    message.metadata.__dict__["_message_id"] = "m"
    return message


def told(made: Federation, state: Path, message: Message, parts: int | None = None, part: int = 0) -> Message:
    config = {} if parts is None else {"partition-id": part}
    context = Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})
    return answer(Station(made, state, parts), message, context)


def test_the_answer_is_one_that_the_server_lets_in(
    tmp_path: Path, tiny_llama: Path, texts: Path, begun: Tensors
) -> None:
    made = settings(tmp_path, tiny_llama, texts)
    reply = told(made, tmp_path / "state", asked(made, begun))
    shapes = {name: value.shape for name, value in begun.items()}
    screened = screen([reply], Sent({7: "n" * 32}, shapes, 1_000_000))
    assert screened.refused == ()
    (update,) = screened.good
    assert 0 < norm_of(update.tensors) < 10
    assert update.figures["loss_after"] < update.figures["loss_before"]
    assert update.examples > 1
    # Nothing travels but what was asked for, and nothing of a text with it.
    assert set(update.tensors) == set(begun)
    everything = b"".join(array.data for array in reply.content.array_records[ARRAYS].values())
    assert SECRET.encode() not in everything


def test_the_same_message_is_answered_the_same(
    tmp_path: Path, tiny_llama: Path, texts: Path, begun: Tensors
) -> None:
    made = settings(tmp_path, tiny_llama, texts)
    first, second, later = (
        told(made, tmp_path / "state", asked(made, begun, number)).content.array_records[ARRAYS]
        for number in (1, 1, 2)
    )
    same = [np.array_equal(first[name].numpy(), second[name].numpy()) for name in begun]
    assert all(same)
    assert not all(np.array_equal(first[name].numpy(), later[name].numpy()) for name in begun)


@pytest.mark.parametrize(
    ("what", "words"), [("settings", "settings are not those"), ("base", "is another model")]
)
def test_a_server_of_another_federation_gets_nothing(
    tmp_path: Path,
    tiny_llama: Path,
    texts: Path,
    begun: Tensors,
    what: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = settings(tmp_path, tiny_llama, texts)
    message = asked(made, begun, **{what: "0" * 64})
    reply = told(made, tmp_path / "state", message)
    assert reply.error.code == OTHER_SETTINGS
    assert words in capfd.readouterr().err
    # Of a sum, the settings come in the step in which it would learn.
    secure = made.model_copy(update={"aggregation": made.aggregation.model_copy(update={"secure": True})})
    config = dict(message.content.config_records[CONFIG]) | {"settings": secure.sha256} | {what: "0" * 64}
    monkeypatch.setattr(
        "slm_export.federated.secure.answer", lambda federation, message, context, train: train([], config)
    )
    reply = told(secure, tmp_path / "state", message)
    assert reply.error.code == CANNOT_LEARN
    assert words in capfd.readouterr().err


def test_of_an_error_the_server_hears_a_number_alone(
    tmp_path: Path, tiny_llama: Path, begun: Tensors, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "letter-to-alice.txt"
    texts.write_bytes(b"\0\0")
    made = settings(tmp_path, tiny_llama, texts)
    reply = told(made, tmp_path / "state", asked(made, begun))
    assert reply.error.code == CANNOT_LEARN
    assert "alice" not in str(reply.error.reason)
    assert "letter-to-alice.txt" in capfd.readouterr().err, "whoever runs the client is told"


def test_personal_data_is_taken_out_before_anything_is_learned(
    tmp_path: Path, tiny_llama: Path, texts: Path
) -> None:
    pytest.importorskip("presidio_analyzer")

    def read(anonymise: Any) -> str:
        made = settings(tmp_path, tiny_llama, texts, data={"anonymise": anonymise})
        base = _base(made.model.model_dump_json())
        rows = _examples(base, made, None, None).rows
        return "".join(base.tokenizer.decode(row["input_ids"]) for row in rows)

    assert SECRET in read(False)
    for anonymise, mark in ((True, "<EMAIL_ADDRESS_1>"), ({"how": "drop"}, "write to \n")):
        anonymised = read(anonymise)
        assert SECRET not in anonymised
        assert mark in anonymised


def test_the_parts_of_a_simulation_are_all_of_the_texts_once(
    tmp_path: Path, tiny_llama: Path, texts: Path
) -> None:
    made = settings(tmp_path, tiny_llama, texts)
    base = _base(made.model.model_dump_json())
    whole = [row["input_ids"] for row in _examples(base, made, None, None).rows]
    dealt = [row["input_ids"] for part in range(3) for row in _examples(base, made, 3, part).rows]
    assert sorted(dealt) == sorted(whole)


def test_a_client_counts_its_own_budget_and_stops_within_it(
    tmp_path: Path, tiny_llama: Path, texts: Path, begun: Tensors
) -> None:
    """Also where the process ends in between: what was spent lies on the disk before anything leaves."""
    privacy = {
        "unit": "example",
        "epsilon": 0.75,
        "delta": 1e-2,
        "clip": 0.5,
        "noise": 1.0,
        "accountant": "rdp",
    }
    made = settings(tmp_path, tiny_llama, texts, privacy=privacy)
    budget, spent = Budget(0.75, 1e-2, "rdp"), [0.0]
    for number in range(1, 100):
        reply = told(made, tmp_path / "state", asked(made, begun, number))
        ledger = Ledger.of(json.loads((tmp_path / "state" / LEDGER).read_text()))
        assert budget.allows(ledger)
        if reply.has_error():
            assert reply.error.code == BUDGET_SPENT
            break
        metrics = reply.content.metric_records["metrics"]
        assert metrics["epsilon"] == ledger.epsilon(1e-2, "rdp") > spent[-1]
        assert set(metrics) == {"num-examples", "epsilon"}
        assert metrics["num-examples"] == 1
        spent.append(float(metrics["epsilon"]))
    assert 1 < len(spent) < 99
    (_, rate, _) = ledger.events[-1]
    assert not budget.allows(ledger.plus(1.0, rate))


def test_what_was_spent_is_never_forgotten_for_an_unreadable_record(
    tmp_path: Path, tiny_llama: Path, texts: Path, begun: Tensors
) -> None:
    privacy = {"unit": "example", "epsilon": 4.0, "delta": 1e-3, "noise": 1.0, "accountant": "rdp"}
    made = settings(tmp_path, tiny_llama, texts, privacy=privacy)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / LEDGER).write_text("[{")
    assert told(made, tmp_path / "state", asked(made, begun)).error.code == CANNOT_LEARN
