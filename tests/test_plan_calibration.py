"""The plan's constants are what the measurements give, and hold for those that the fit has not seen."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slm_export.planning.roofline import fitted

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def calibrate() -> ModuleType:
    path = ROOT / "benchmarks" / "calibrate.py"
    sys.path.insert(0, str(path.parent))  # where the script, run as one, finds its neighbours
    spec = importlib.util.spec_from_file_location("calibrate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibrate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(calibrate: ModuleType) -> dict[str, Any]:
    text = (ROOT / "benchmarks" / "calibration.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = calibrate.tomllib.loads(text)
    return found


def test_the_shipped_constants_are_those_of_the_measurements(
    calibrate: ModuleType, data: dict[str, Any]
) -> None:
    made = calibrate.document(calibrate.fit(data), calibrate.fit_conversion(data))
    shipped = json.loads((ROOT / "slm_export" / "data" / "roofline.json").read_text(encoding="utf-8"))
    assert made.keys() == shipped.keys()
    for where in ("device", "host"):
        for format, of in made[where].items():
            for name in ("share", "per_cycle"):
                assert shipped[where][format][name] == pytest.approx(of[name], rel=0.01)
            assert shipped[where][format]["layer_s"] == pytest.approx(of["layer_s"], rel=0.01, abs=1e-6)
    for format, of in made["conversion"].items():
        assert shipped["conversion"][format] == pytest.approx(of, rel=0.01)


def test_the_fit_does_not_see_what_it_is_held_against(calibrate: ModuleType, data: dict[str, Any]) -> None:
    other = copy.deepcopy(data)
    for table in ("speed", "load", "conversion"):
        for row in other[table]:
            if row["split"] == "validate":
                row.update(
                    {key: 7 * row[key] for key in ("decode", "prefill", "seconds", "mib") if key in row}
                )
    assert calibrate.fit(other) == calibrate.fit(data)
    assert calibrate.fit_conversion(other) == calibrate.fit_conversion(data)


def test_four_of_five_published_rates_of_phones_are_met(calibrate: ModuleType, data: dict[str, Any]) -> None:
    rows = [
        row
        for row in data["speed"]
        if row["split"] == "validate" and data["devices"][row["device"]]["where"] == "device"
    ]
    off = [
        calibrate.decode_of(data, row, fitted()["device"][row["runtime"]]) / row["decode"] - 1 for row in rows
    ]
    assert len(rows) >= 20
    assert sum(abs(each) <= 0.2 for each in off) >= 0.8 * len(rows)


def test_every_size_is_within_two_percent(calibrate: ModuleType, data: dict[str, Any]) -> None:
    assert len(data["size"]) >= 13
    for row in data["size"]:
        assert calibrate.size_of(data, row) == pytest.approx(row["bytes"], rel=0.02), row


def test_no_row_is_without_a_source(data: dict[str, Any]) -> None:
    for table in ("speed", "load", "size", "memory"):
        assert all(row["source"] for row in data[table])
    assert all(device["source"] for device in data["devices"].values())
