"""Faults planted in exports are caught by the default gate, and good exports raise no alarm.

The default run takes a few, in one format; ``pytest -m slow tests/faults`` takes all in every format, for hours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from every_fault import FAULTS
from fault import FORMATS, Fault
from models import MODELS
from workshop import GOOD, Workshop

QUICK = {
    ("two layers exchanged, by the exporter", "onnx"),
    ("keys and values exchanged", "onnx"),
    ("one position late", "onnx"),
    ("an epsilon ten times too large", "onnx"),
    ("scales of the next group, by a pass", "onnx"),
    ("another opening token", "onnx"),
    ("one bit of the weights is another", "onnx"),
    ("another number of tokens", "onnx"),
}
MISSED: set[tuple[str, str]] = set()
"""Fault and format, where the gate is known to see nothing; docs/trust.md says why."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def _planted() -> Iterator[Any]:
    for fault in FAULTS:
        for format in fault.formats:
            marks = [] if (fault.name, format) in QUICK else [pytest.mark.slow]
            yield pytest.param(fault, format, marks=marks, id=f"{fault.name}-{format}")


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60


@pytest.mark.parametrize(("fault", "format"), _planted())
def test_a_fault_is_caught(fault: Fault, format: str, workshop: Workshop) -> None:
    caught = workshop.gate(fault, format)
    assert bool(caught.by) is ((fault.name, format) not in MISSED), caught


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.slow
def test_a_good_export_raises_no_alarm(model: str, format: str, bits: int, workshop: Workshop) -> None:
    assert workshop.gate(replace(GOOD, model=model, bits=bits), format).by == ""


def test_the_example_raises_no_alarm(workshop: Workshop) -> None:
    assert workshop.gate(GOOD, "onnx").by == ""
