"""Size against quality: points that are the best at their size, some of them measured, on a page of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import checkpoint, normal

from slm_export.budget.choices import INT8
from slm_export.budget.expectation import Expectation, Loss
from slm_export.budget.frontier import MEASURED, frontier, measured, ratio
from slm_export.reports.page.frontier_page import frontier_page, rows


@pytest.fixture
def expected(monkeypatch):
    """Six matrices, of which the later ones cost more."""
    source = checkpoint({f"layers.{n}.weight": normal(64, 256, seed=n) for n in range(6)})
    monkeypatch.setattr("slm_export.budget.costs.program_bytes", lambda *_: 1000.0)
    made = Expectation.of(source, ("executorch",), None, 0)
    costs = {
        name: {c: (n + 1) * {16: 0.0, 8: 1e-5, 4: 1e-3 * max(c.group, 32) / 32}[c.bits] for c in choices}
        for n, (name, choices) in enumerate(made.options.items())
    }
    return replace(made, loss=Loss(costs))


def test_what_is_larger_is_better(expected):
    points = frontier(expected, None)
    assert len(points) > 4
    assert [p.bytes for p in points] == sorted({p.bytes for p in points})
    predicted = [p.predicted for p in points]
    assert predicted == sorted(predicted, reverse=True)
    assert points[0].bytes == round(expected.size("executorch", expected.least()))
    assert not any(point.chosen for point in points)


def test_the_chosen_allocation_is_a_point_once(expected):
    allocation = dict.fromkeys(expected.options, INT8)
    name = next(iter(allocation))
    for chosen in (allocation, {**allocation, name: expected.options[name][-1]}):
        points = frontier(expected, chosen)
        assert [point.allocation for point in points if point.chosen] == [chosen]
        assert [point.allocation for point in points].count(chosen) == 1


def test_the_ends_and_the_chosen_point_are_measured(expected):
    seen = []
    points = measured(
        frontier(expected, dict.fromkeys(expected.options, INT8)), lambda a: seen.append(a) or 1.5
    )
    assert points[0].measured == 1.5
    assert all(point.measured == 1.5 for point in points if point.chosen)
    assert MEASURED <= len(seen) <= MEASURED + 2 < len(points)


def test_the_page_keeps_predicted_and_measured_apart(expected):
    points = measured(frontier(expected, None), lambda _: 1.25)
    page = frontier_page("a <model>", "onnx for a phone", "perplexity ratio", points, ("a note",))
    assert "a &lt;model&gt;" in page
    assert page.count('class="measured"') == sum(point.measured is not None for point in points)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert rows(points)[0][3] == "1.2500"
    assert [row[3] for row in rows(points)].count("") == sum(point.measured is None for point in points)


def test_a_ratio_of_perplexities():
    assert ratio(2.0, 2.0) == 1
    assert ratio(2.0, 2.0 + float(torch.log(torch.tensor(1.1)))) == pytest.approx(1.1)
