"""The walks of docs/federated.md, typed as they stand there; and the tables of its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")
pytest.importorskip("ray")

from federating import free_port
from test_federated_simulation import changed
from walks import page, typed, walk

from slm_export.federated.settings import Federation
from slm_export.federated.updates import Reason

PAGE = page("federated.md")


@pytest.mark.slow
def test_from_a_shipped_bundle_to_a_delegate_that_has_learned(tmp_path: Path) -> None:
    done = typed(walk(PAGE, "simulation"), tmp_path)
    assert done.returncode == 0, done.stderr
    weeks = [
        json.loads((tmp_path / week / "federation.json").read_text())["federation"]
        for week in ("week-1", "week-2")
    ]
    for told in weeks:
        assert told["rounds"]["that_changed"] == 2
        assert 0 < told["privacy"]["spent"]["epsilon"] <= 8.0
    assert weeks[0]["began_with"] is None
    assert weeks[1]["began_with"]["privacy"] == weeks[0]["privacy"]
    adapters = json.loads((tmp_path / "shipped" / "manifest.json").read_text())["adapters"]
    assert [each["name"] for each in adapters] == ["week-1", "week-2"]
    learned = json.loads((tmp_path / "merged" / "manifest.json").read_text())["model"]["learned"]
    assert learned["settings"]["privacy"] == weeks[1]["privacy"]
    (answer,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(answer)["delegate"] == "coder"
    assert json.loads(answer)["answer"]
    assert answer in done.stdout


@pytest.mark.slow
def test_server_and_clients(tmp_path: Path) -> None:
    done = typed(walk(PAGE, "deployment").replace("9092", str(free_port())), tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "adapter" / "federation.json").read_text())["federation"]
    assert told["rounds"]["that_changed"] == 1
    assert changed(tmp_path / "adapter")


def test_the_tables_name_every_key_and_every_reason() -> None:
    file = PAGE[PAGE.index("## The file") : PAGE.index("## What the server lets in")]
    for name, field in Federation.model_fields.items():
        kinds = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if kind]
        tables = [kind for kind in kinds if hasattr(kind, "model_fields")]
        assert f"`[{name}]`" in file or not tables, name
        for table in tables:
            for key in table.model_fields:
                assert f"`{key}`" in file, f"{name}.{key}"
    screen = PAGE[PAGE.index("## What the server lets in") : PAGE.index("## Privacy")]
    for reason in Reason.__args__:
        assert f"`{reason}`" in screen, reason
