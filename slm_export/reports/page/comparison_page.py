"""The page of several bundles side by side."""

from __future__ import annotations

from slm_export.reports import words
from slm_export.reports.comparison import Column, Comparison, cell
from slm_export.reports.figures import Figure
from slm_export.reports.page.plots import Mark, Plot, linear
from slm_export.reports.page.sections import Bar
from slm_export.reports.page.templates import render
from slm_export.reports.words import megabytes

_QUALITY = ("perplexity_ratio", "cosine_mean", "agreement")
"""What size is plotted against: the first that all columns have."""
_CHARTS = ("bytes", "kl_mean", "decode_tokens_per_s", "prefill_tokens_per_s", "latency_ms", "model_rss_mb")


def comparison_page(comparison: Comparison) -> str:
    """Return the page."""
    return render(
        "comparison.html.j2",
        comparison=comparison,
        words=words,
        section=comparison_section(comparison, level=2),
    )


def comparison_section(comparison: Comparison, level: int) -> str:
    """Return the table and the plots as HTML, headed by ``<h2>`` or whatever ``level`` there is."""
    return render(
        "comparison_section.html.j2",
        comparison=comparison,
        level=level,
        words=words,
        rows=[
            (one, [cell(comparison, one, column) for column in comparison.columns])
            for one in comparison.figures
        ],
        charts=[
            (one, _bars(comparison, one))
            for one in comparison.figures
            if one.name in _CHARTS and len(comparison.columns) > 1
        ],
        plot=_plot(comparison),
    )


def _bars(comparison: Comparison, one: Figure) -> list[Bar]:
    longest = max(column.figures.get(one.name, 0.0) for column in comparison.columns) or 1.0
    return [
        Bar(column.title, one.show(value), 100 * value / longest)
        for column in comparison.columns
        if (value := column.figures.get(one.name)) is not None
    ]


def _plot(comparison: Comparison) -> Plot | None:
    """Return size against quality; None with fewer than two points, or without a quality that all have."""
    columns = comparison.columns
    name = next((name for name in _QUALITY if all(name in column.figures for column in columns)), None)
    if name is None or len(columns) < 2:
        return None
    label = next(one.label for one in comparison.figures if one.name == name)
    x = linear([column.figures["bytes"] for column in columns], lambda value: megabytes(round(value)))
    y = linear([column.figures[name] for column in columns])

    def mark(column: Column) -> Mark:
        size, quality = column.figures["bytes"], column.figures[name]
        title = f"{column.title}: {megabytes(round(size))}, {label} {words.figure(quality)}"
        first = column.bundle == columns[0].bundle
        return Mark(x.at(size), 100 - y.at(quality), title, column.title, chosen=first)

    marks = tuple(mark(column) for column in columns)
    return Plot(f"Size against {label}", "size of the artifact", label, x.ticks(), y.ticks(), marks)
