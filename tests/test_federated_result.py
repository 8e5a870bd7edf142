"""What a federation says of itself: what was spent, by whom, and nothing that was not counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from federating import begun, federation

from slm_export.federated.accounting import Ledger
from slm_export.federated.result import MANIFEST, manifest_of
from slm_export.federated.settings import Federation
from slm_export.federated.state import Round, State
from slm_export.reports.taught import taught_notes, taught_rows
from slm_export.reports.words import figure

ROUNDS = (
    Round(1, 4, 3, {"huge": 1}, ((5, "huge", "norm 9"),), changed=True, loss_before=3.0, loss_after=2.0),
    Round(2, 4, 1, {"huge": 2, "silent": 1}, changed=False),
)
USER = {"unit": "user", "epsilon": 8.0, "delta": 1e-5, "accountant": "rdp", "clip": 0.5}
EXAMPLE = {"unit": "example", "epsilon": 8.0, "delta": 1e-5, "accountant": "rdp"}


def told(settings: Federation, **state: Any) -> dict[str, Any]:
    made = manifest_of("base", "0" * 64, settings, replace(State(begun(), ROUNDS), **state))
    json.dumps(made, allow_nan=False)
    return made


def notes(made: dict[str, Any]) -> str:
    learned = {"by": "federate", "rows": [], "held_out": {}, "data_licence": None, "settings": made}
    report: Any = SimpleNamespace(model=SimpleNamespace(learned=learned), formats=(), held_out=None)
    assert len(taught_rows(report)) == 1
    (note,) = taught_notes(report)
    return note


def test_counts_are_sums_over_the_rounds_and_nobody_is_named(tmp_path: Path) -> None:
    made = told(federation(tmp_path, rounds={"number": 3}), stopped="the budget")
    assert made["rounds"] == {"asked": 3, "done": 2, "that_changed": 1, "stopped": "the budget"}
    assert made["updates"] == {"drawn": 8, "good": 4}
    assert made["refused"] == {"huge": 3, "silent": 1}
    assert "named" not in json.dumps(made)
    assert str(tmp_path) not in json.dumps(made)


def test_how_many_were_drawn_is_told_where_it_is_no_secret_alone(tmp_path: Path) -> None:
    ledger = Ledger().plus(2.0, 0.5, 2).recorded()
    names = ("updates", "refused", "each_round")
    drawn = told(federation(tmp_path, privacy=USER, rounds={"fraction": 0.5}), noise=2.0, ledger=ledger)
    assert [drawn[name] for name in names] == [None, None, None]
    assert drawn["rounds"]["done"] == 2
    all_of_them = told(federation(tmp_path, privacy=USER), noise=2.0, ledger=ledger)
    assert None not in [all_of_them[name] for name in names]


def test_without_privacy_nothing_is_claimed(tmp_path: Path) -> None:
    made = told(federation(tmp_path))
    assert made["privacy"] == {"unit": "none"}
    assert "no differential privacy" in notes(made)


def test_user_level_is_what_the_ledger_says(tmp_path: Path) -> None:
    ledger = Ledger().plus(2.0, 1.0, 2)
    made = told(federation(tmp_path, privacy=USER), noise=2.0, ledger=ledger.recorded())
    privacy = made["privacy"]
    assert privacy["spent"] == {"epsilon": ledger.epsilon(1e-5, "rdp"), "delta": 1e-5}
    assert privacy["declared"] == {"epsilon": 8.0, "delta": 1e-5}
    assert (privacy["clip"], privacy["noise"], privacy["sampling"]) == (0.5, 2.0, "poisson")
    assert f"user-level differential privacy: epsilon {figure(privacy['spent']['epsilon'])}," in notes(made)


def test_example_level_is_the_largest_that_a_client_told(tmp_path: Path) -> None:
    rounds = (replace(ROUNDS[0], epsilon=2.5), replace(ROUNDS[1], epsilon=None))
    assert told(federation(tmp_path, privacy=EXAMPLE), rounds=rounds)["privacy"]["spent"]["epsilon"] == 2.5
    silent = told(federation(tmp_path, privacy=EXAMPLE))
    assert silent["privacy"]["spent"]["epsilon"] is None
    assert "epsilon unknown" in notes(silent)


def test_what_it_began_with_is_said_with_all_before_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    unknown = {"base": str(tmp_path), "start": str(first)}
    assert told(federation(tmp_path, model=unknown))["began_with"]["privacy"] == {"unit": "unknown"}
    spent = told(federation(tmp_path, privacy=USER), noise=2.0, ledger=Ledger().plus(2.0, 1.0).recorded())
    (first / MANIFEST).write_text(json.dumps({"schema": 1, "federation": spent}))
    after = told(federation(tmp_path, model=unknown))
    (second / MANIFEST).write_text(json.dumps({"schema": 1, "federation": after}))
    last = told(federation(tmp_path, model={"base": str(tmp_path), "start": str(second)}))
    assert last["began_with"]["privacy"] == {"unit": "none"}
    assert last["began_with"]["began_with"]["privacy"] == spent["privacy"]
    assert notes(last).count("it began with one of an earlier federation") == 2
    assert "user-level" in notes(last)
