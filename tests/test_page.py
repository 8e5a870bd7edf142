"""Plots are in proportion to what they show."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
from sample_reports import FRONTIER, weight_rows

from slm_export.reports.details import FrontierPoint, PredictedPhase, Prediction
from slm_export.reports.page import plots, sections
from slm_export.reports.page.treemap import Box, Cell, squarify, treemap
from slm_export.results import Check


def overlap(one: Box, other: Box) -> float:
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    return max(0.0, width) * max(0.0, height)


@pytest.mark.parametrize("sizes", [[1], [5, 3, 2, 2, 1], [100, 1, 1, 1], [1] * 17, [7, 0.001]])
def test_areas_are_in_proportion_and_fill_the_box(sizes: list[float]) -> None:
    boxes = squarify(sizes, Box(10, 20, 60, 40))
    areas = [box.width * box.height for box in boxes]
    assert areas == pytest.approx([60 * 40 * size / sum(sizes) for size in sizes])
    for box in boxes:
        assert box.x >= 10 - 1e-6
        assert box.y >= 20 - 1e-6
        assert box.x + box.width <= 70 + 1e-6
        assert box.y + box.height <= 60 + 1e-6
    for one, other in combinations(boxes, 2):
        assert overlap(one, other) < 1e-6


def test_the_treemap_shows_every_byte_once() -> None:
    rows = weight_rows()
    drawn = treemap(rows)
    cells: list[Cell] = [cell for group in drawn.groups for cell in group.cells]
    total = sum(row.bytes for row in rows)
    assert sum(cell.bytes for cell in cells) == total
    for cell in cells:
        assert cell.box.width * cell.box.height == pytest.approx(1e4 * cell.bytes / total)
    assert drawn.groups[0].label == "embedding"
    assert {"layer 0", "layer 7"} <= {group.label for group in drawn.groups}
    assert sum(kind.share for kind in drawn.kinds) == pytest.approx(1)
    assert {kind.name: kind.bits for kind in drawn.kinds}["self_attn"] == "4, 8 bits"


def test_without_weights_nothing_is_drawn() -> None:
    assert treemap(()).groups == ()
    assert sections.heat(()) is None
    assert plots.frontier((FrontierPoint("x", 1),)) is None
    assert plots.roofline(()) is None


def test_errors_are_shaded_in_order() -> None:
    heat = sections.heat(weight_rows())
    assert heat is not None
    assert heat.parts == ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    first, last = heat.layers[0][1], heat.layers[-1][1]
    assert first[-1] is not None
    assert last[0] is not None
    assert (first[-1].step, last[0].step) == (0, sections.STEPS - 1)
    steps = [cells[0].step for _, cells in heat.layers if cells[0]]
    assert steps == sorted(steps)
    assert [name for name, _ in heat.outside] == ["model.embed_tokens"]


def test_errors_that_are_alike_have_one_shade() -> None:
    rows = [dataclasses.replace(row, error=0.004) for row in weight_rows()]
    heat = sections.heat(rows)
    assert heat is not None
    assert {cell.step for _, cells in heat.layers for cell in cells if cell} == {0}


@pytest.mark.parametrize(
    ("name", "value", "limit", "used"),
    [
        ("kl_mean", 0.01, 0.04, 25),
        ("kl_mean", 0.08, 0.04, 100),
        ("top1_agreement", 0.97, 0.9, 30),
        ("perplexity_ratio", 1.003, 1.004, 75),
        ("decode_tokens_per_s", 40, 10, 25),
        ("kl_mean", float("nan"), 0.04, None),
        ("codes", None, None, None),
    ],
)
def test_the_share_of_an_allowance(
    name: str, value: float | None, limit: float | None, used: float | None
) -> None:
    found = sections.headroom(Check(name, True, "", value, limit))
    assert found == (None if used is None else pytest.approx(used))


def test_the_frontier_keeps_predicted_and_measured_apart() -> None:
    drawn = plots.frontier(FRONTIER)
    assert drawn is not None
    assert [mark.measured for mark in drawn.marks].count(False) == 4
    assert [mark.measured for mark in drawn.marks].count(True) == 3
    (chosen,) = [mark for mark in drawn.marks if mark.chosen]
    assert chosen.label == "5.0 bits"
    predicted = [mark for mark in drawn.marks if not mark.measured]
    assert [mark.x for mark in predicted] == sorted(mark.x for mark in predicted)
    assert [mark.y for mark in predicted] == sorted(mark.y for mark in predicted)  # smaller ratios lie lower
    assert len(drawn.lines) == 3
    assert all(0 <= mark.x <= 100 and 0 <= mark.y <= 100 for mark in drawn.marks)


def test_a_prediction_lies_on_its_roof() -> None:
    """A phase whose time is what the roofline allows touches the line; one that takes ten times as long lies below."""
    machine = Prediction("a phone", 1e10, 1e12, ())
    phases = []
    for operations in (1e6, 1e9):
        possible = max(operations / machine.operations_per_s, 1e6 / machine.bytes_per_s)
        phases.append(PredictedPhase("x", operations, 1e6, possible, 10 * possible))
    drawn = plots.roofline([("executorch", dataclasses.replace(machine, phases=tuple(phases)))])
    assert drawn is not None
    slope, flat = drawn.lines
    memory, slow_memory, compute, slow_compute = drawn.marks
    share = (memory.x - slope.x1) / (slope.x2 - slope.x1)
    assert memory.y == pytest.approx(slope.y1 + share * (slope.y2 - slope.y1))
    assert compute.y == pytest.approx(flat.y1)
    assert slow_memory.y > memory.y
    assert slow_compute.y > compute.y
    assert (slow_memory.measured, memory.measured) == (True, False)


@pytest.mark.parametrize(("low", "high"), [(1.0028, 1.0031), (0.5, 7.0), (3e6, 6e6)])
def test_ticks_are_round_inside_and_told_apart(low: float, high: float) -> None:
    axis = plots.linear([low, high])
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 7
    assert all(0 <= at <= 100 for at, _ in ticks)
    assert len({text for _, text in ticks}) == len(ticks)
    for at, text in ticks:
        assert axis.at(float(text)) == pytest.approx(at, abs=1e-6)
