"""The page of a frontier: size against quality, without an export."""

from __future__ import annotations

from collections.abc import Sequence

from slm_export.budget.frontier import Point
from slm_export.reports import words
from slm_export.reports.page.plots import Sized, size_against
from slm_export.reports.page.templates import render
from slm_export.reports.words import megabytes

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
        plot=size_against(
            quality, [Sized(p.label, p.bytes, p.predicted, p.measured, p.chosen) for p in points]
        ),
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
