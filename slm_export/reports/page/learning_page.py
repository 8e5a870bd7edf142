"""The page of a model that was taught: the table, the curves, the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from slm_export.reports import words
from slm_export.reports.page.plots import Line, Mark, Plot, linear
from slm_export.reports.page.templates import render

if TYPE_CHECKING:
    from slm_export.learning.outcome import Outcome


def learning_page(outcome: Outcome, table: Sequence[tuple[str, ...]]) -> str:
    """Return the page; ``table``: the models and their figures, a header first."""
    return render(
        "learning.html.j2",
        outcome=outcome,
        words=words,
        head=table[0],
        rows=table[1:],
        plots=_plots(outcome),
        data=_flat(outcome.data),
        held_out=_flat(outcome.held_out),
        settings=_flat(outcome.settings),
        lineage=_flat(outcome.lineage),
    )


def curve_plot(title: str, points: Sequence[tuple[float, float]], label: str) -> Plot:
    """Return a line through (step, value)."""
    x, y = linear([step for step, _ in points]), linear([value for _, value in points])
    at = [(x.at(step), 100 - y.at(value)) for step, value in points]
    lines = tuple(Line(a[0], a[1], b[0], b[1]) for a, b in pairwise(at))
    ends = {0, len(points) - 1}
    marks = tuple(
        Mark(
            *at[i],
            f"step {points[i][0]:g}: {words.figure(points[i][1])}",
            words.figure(points[i][1]) if i in ends else "",
        )
        for i in range(len(points))
        if i in ends or len(points) <= 20
    )
    return Plot(title, "step", label, x.ticks(), y.ticks(), marks, lines)


def _plots(outcome: Outcome) -> list[Plot]:
    made = []
    for name, curve in outcome.curves.items():
        losses = [(p.step, p.loss) for p in curve.points if p.loss is not None]
        if len(losses) > 1:
            made.append(curve_plot(f"{name}: loss", losses, "loss"))
        measured: dict[str, list[tuple[float, float]]] = {}
        for point in curve.points:
            for figure, value in (point.measured or {}).items():
                measured.setdefault(figure, []).append((point.step, value))
        made += [
            curve_plot(
                f"{name}: {figure.replace('_', ' ')} on held-out text", values, figure.replace("_", " ")
            )
            for figure, values in measured.items()
            if len(values) > 1
        ]
    return made


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return names and values of nested settings as rows."""
    made: list[tuple[str, str]] = []
    for name, value in values.items():
        label = f"{before}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            made += _flat(value, f"{before}{name}: ")
        elif isinstance(value, list):
            made += [(label, str(item)) for item in value]
        elif value is not None:
            made.append((label, f"{value:,}" if isinstance(value, int) and value is not True else str(value)))
    return made
