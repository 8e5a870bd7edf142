"""The page of a frontier: size against quality, without an export."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from slm_export.budget.frontier import Point
from slm_export.reports import words
from slm_export.reports.page.plots import Line, Mark, Plot, linear
from slm_export.reports.page.templates import render
from slm_export.reports.words import figure, megabytes

HEAD = ("recipe", "size", "predicted", "measured")


def frontier_page(name: str, where: str, quality: str, points: Sequence[Point], notes: Sequence[str]) -> str:
    """Return the page.

    Given   name: of the model; where: the device and the format; quality: what is plotted, such as ``mean cosine``
    """
    return render(
        "frontier.html.j2",
        name=name,
        where=where,
        quality=quality,
        plot=_plot(quality, points),
        head=HEAD,
        rows=rows(points),
        notes=notes,
        chosen=any(point.chosen for point in points),
        words=words,
    )


def rows(points: Sequence[Point]) -> list[tuple[str, str, str, str]]:
    """Return recipe, size, predicted and measured quality of every point."""
    return [
        (
            point.label + (" (chosen)" if point.chosen else ""),
            megabytes(point.bytes),
            "" if point.predicted is None else f"{point.predicted:.4f}",
            "" if point.measured is None else f"{point.measured:.4f}",
        )
        for point in points
    ]


def _plot(quality: str, points: Sequence[Point]) -> Plot:
    values = [value for point in points for value in (point.predicted, point.measured) if value is not None]
    x = linear([point.bytes for point in points], lambda value: megabytes(round(value)))
    y = linear(values)
    marks, line = [], []
    for point in points:
        for value, known in ((point.predicted, False), (point.measured, True)):
            if value is None:
                continue
            title = f"{point.label}: {megabytes(point.bytes)}, {figure(value)} {'measured' if known else 'predicted'}"
            chosen = point.chosen and known
            mark = Mark(
                x.at(point.bytes), 100 - y.at(value), title, point.label if chosen else "", known, chosen
            )
            marks.append(mark)
            line += [] if known else [mark]
    lines = tuple(Line(a.x, a.y, b.x, b.y) for a, b in pairwise(line))
    return Plot(
        f"Size against {quality}", "size of the artifact", quality, x.ticks(), y.ticks(), tuple(marks), lines
    )
