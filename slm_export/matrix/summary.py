"""A matrix as JSON, Markdown and a page: every cell with its outcome, and model by model the bundles side by side.

write            all three, into the folder of results
comparisons_of   Summary -> a Comparison for each model
to_json          for programs
to_markdown      for a pull request
to_html          a page to keep
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from slm_export.machine import machine_errors
from slm_export.matrix.cells import EXCLUDED
from slm_export.matrix.record import answer_of
from slm_export.matrix.results import Result, Summary
from slm_export.reports import comparison as side_by_side
from slm_export.reports import words
from slm_export.reports.compared import read_bundles, steps_words
from slm_export.reports.comparison import Column, Comparison, compare_bundles, escaped
from slm_export.reports.figures import measured
from slm_export.reports.page.comparison_page import comparison_section
from slm_export.reports.page.templates import render

SCHEMA = 1
HEADS = ("cell", "formats", "outcome", "time", "memory", "why")


def write(summary: Summary) -> dict[str, Any]:
    """Write matrix.json, matrix.md and matrix.html into the folder of results, and return the first."""
    comparisons = comparisons_of(summary)
    document = to_json(summary, comparisons)
    with machine_errors("write the comparison", summary.out):
        for name, text in (
            ("matrix.json", json.dumps(document, ensure_ascii=False, indent=2) + "\n"),
            ("matrix.md", to_markdown(summary, comparisons)),
            ("matrix.html", to_html(summary, comparisons)),
        ):
            (summary.out / name).write_text(text, encoding="utf-8", newline="\n")
    return document


def comparisons_of(summary: Summary) -> dict[str, Comparison]:
    """Return model -> its bundles side by side, behind them what was measured of cells that failed.

    The first bundle is what the others are held against; a model of which nothing was measured is not there.
    """
    found = {}
    for model in dict.fromkeys(one.cell.model for one in summary.results):
        results = [one for one in summary.results if one.cell.model == model]
        folders = [one.bundle for one in results if one.bundle is not None]
        failed = tuple(column for one in results if one.bundle is None for column in _columns(one))
        if folders:
            made = compare_bundles(read_bundles(folders))
            found[model] = dataclasses.replace(made, model=model, columns=(*made.columns, *failed))
        elif failed:
            found[model] = Comparison(model, failed, {}, ())
    return found


def _columns(result: Result) -> list[Column]:
    """Return what a failed gate had measured: a column for each format."""
    report = answer_of(result.folder).get("report") or {}
    recipe = steps_words({"pass": row["name"], **row["options"]} for row in report.get("passes", ()))
    return [
        Column(
            result.cell.name,
            entry["artifact"]["format"],
            str(report["device_title"]),
            recipe,
            "pass" if entry["passed"] else "fail",
            measured({**entry["artifact"], **(entry["quality"] or {}), **(entry["latency"] or {})}),
        )
        for entry in report.get("formats", ())
    ]


def to_json(summary: Summary, comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """Return the summary as JSON values; paths are relative to ``out``."""
    return {
        "schema": SCHEMA,
        "out": str(summary.out),
        "exit_code": summary.exit_code,
        "cells": [_cell(summary, one) for one in summary.results],
        "skipped": [dataclasses.asdict(one) for one in summary.skipped],
        "comparisons": {model: side_by_side.to_json(one) for model, one in comparisons.items()},
    }


def _cell(summary: Summary, one: Result) -> dict[str, Any]:
    inside = {
        name: None if path is None else path.relative_to(summary.out).as_posix()
        for name, path in (("bundle", one.bundle), ("folder", one.folder))
    }
    cell = one.cell
    return {
        "name": cell.name,
        **{axis: getattr(cell, axis) for axis in ("model", "recipe", "device", "formats")},
        "outcome": one.outcome,
        "exit_code": one.code,
        "reason": one.reason or None,
        "seconds": one.seconds,
        "peak_rss_mb": one.peak_rss_mb,
        "predicted_mb": None if one.predicted_bytes is None else one.predicted_bytes / (1 << 20),
        **inside,
    }


def row_of(one: Result) -> tuple[str, ...]:
    """Return a cell under `HEADS`."""
    return (
        one.cell.name,
        ", ".join(one.cell.formats),
        one.outcome,
        "" if one.seconds is None else words.seconds(one.seconds),
        "" if one.peak_rss_mb is None else f"{one.peak_rss_mb:,.0f} MiB",
        one.reason,
    )


def skipped_words(summary: Summary) -> list[str]:
    """Return a line for everything that is not exported, alike reasons together; what was excluded is only counted."""
    by_reason: dict[str, list[str]] = {}
    for one in summary.skipped:
        by_reason.setdefault(one.reason, []).append(f"{one.model}.{one.recipe}.{one.device} {one.format}")
    return [
        f"{len(names)} combinations: {reason}" if reason == EXCLUDED else f"{', '.join(names)}: {reason}"
        for reason, names in by_reason.items()
    ]


def to_markdown(summary: Summary, comparisons: Mapping[str, Comparison]) -> str:
    """Return the table of cells, and a comparison for each model."""
    rows = [
        HEADS,
        ("---",) * len(HEADS),
        *([escaped(text) for text in row_of(one)] for one in summary.results),
    ]
    lines = [f"## {headline(summary)}", "", *(f"| {' | '.join(row)} |" for row in rows)]
    lines += [line for told in skipped_words(summary) for line in ("", f"Skipped: {escaped(told)}")]
    sections = [side_by_side.to_markdown(one) for one in comparisons.values()]
    return "\n\n".join(["\n".join(lines), *(section.rstrip("\n") for section in sections)]) + "\n"


def to_html(summary: Summary, comparisons: Mapping[str, Comparison]) -> str:
    """Return the page."""
    sections: Sequence[tuple[Comparison, str]] = [
        (one, comparison_section(one, level=3)) for one in comparisons.values()
    ]
    return render(
        "matrix.html.j2",
        title=headline(summary),
        failed=summary.failed,
        heads=HEADS,
        rows=[(one, row_of(one)) for one in summary.results],
        skipped=skipped_words(summary),
        sections=sections,
        words=words,
    )


def headline(summary: Summary) -> str:
    """Return ``12 cells: 9 made, 2 kept, 1 failed``."""
    counts = [
        (outcome, sum(one.outcome == outcome for one in summary.results))
        for outcome in ("made", "kept", "failed")
    ]
    cells = len(summary.results)
    return f"{cells} cell{'s' * (cells != 1)}: " + ", ".join(
        f"{count} {name}" for name, count in counts if count
    )
