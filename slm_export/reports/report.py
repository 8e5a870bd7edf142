"""The outcome of an export, three ways: JSON for programs, a summary for the terminal, a page to keep."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.reports import words
from slm_export.reports.taught import taught_notes, taught_rows
from slm_export.results import FormatResult, Report
from slm_export.source.tasks import GENERATION

SCHEMA = 1


def bundled(report: Report, folder: Path) -> Report:
    """Return the report with artifact paths relative to ``folder``, as they stay true after a move."""

    def inside(path: Path) -> Path:
        # Both sides resolved: a temporary folder is often behind a link.
        return path.resolve().relative_to(folder.resolve()) if path.is_absolute() else path

    def relative(result: FormatResult) -> FormatResult:
        artifact = result.artifact
        made = dataclasses.replace(
            artifact, path=inside(artifact.path), data=tuple(inside(path) for path in artifact.data)
        )
        adapters = tuple(dataclasses.replace(each, path=inside(each.path)) for each in result.adapters)
        return dataclasses.replace(result, artifact=made, adapters=adapters)

    return dataclasses.replace(report, formats=tuple(relative(result) for result in report.formats))


def to_json(report: Report) -> dict[str, Any]:
    """Return everything in the report as JSON values; the same report gives the same document.

    JSON has no NaN or infinity: such a figure becomes the text "nan" or "inf", which no reader can
    take for "not measured" (null).
    """
    document = _plain(report)
    assert isinstance(document, dict)
    for entry, result in zip(document["formats"], report.formats, strict=True):
        entry["passed"] = result.passed
        entry["artifact"]["ratio"] = _ratio(report, result)
    return {"schema": SCHEMA, "passed": report.passed, **document}


def _ratio(report: Report, result: FormatResult) -> float | None:
    return report.model.source_bytes / result.artifact.bytes if result.artifact.bytes else None


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.as_posix() if isinstance(value, PurePath) else str(value)


def next_commands(report: Report, out: Path) -> tuple[str, ...]:
    """Return what a person would type next, quoted for a shell."""
    place = shlex.quote(str(out))
    prompt = "def fibonacci(n):" if "code" in report.model.name.lower() else "Once upon a time"
    if report.model.task != GENERATION:
        prompt = "The parcel arrived a day early."
    if out.is_dir() and not (out / "tokenizer").is_dir():
        prompt = "12 7 99"  # ids: nothing here reads text
    return (
        f"slm-export run {place} --prompt {shlex.quote(prompt)}",
        f"slm-export verify {place}",
    )


def print_report(console: Console, report: Report, out: Path) -> None:
    """Print the summary: what, how big, how faithful, how fast, and what to type next."""
    model = report.model
    title = (
        f"{model.name}: {model.architecture}, {model.task}, {words.parameters(model.parameters)} parameters"
    )
    console.print(_line(title, "bold"))
    console.print(
        _line(f"for {report.device_title} ({report.target}), in {words.seconds(report.seconds)}", "")
    )
    _print_taught(console, report)
    _print_sizes(console, report)
    _print_passes(console, report)
    for result in report.formats:
        _print_fidelity(console, result)
    for result in report.formats:
        _print_speed(console, result)
    if report.parity:
        _heading(console, "The formats beside each other")
        _rows(console, words.parity_rows(report.parity))
    if report.notes:
        _heading(console, "Notes")
        for note in report.notes:
            console.print(_line(f"  {note}", "yellow"))
    _heading(console, "Next")
    for command in next_commands(report, out):
        # Never wrapped: it is to be copied.
        console.print(_line(f"  {command}", "cyan"), soft_wrap=True)


def _line(text: str, style: str) -> Text:
    return Text(words.printable(text), style=style)


def _heading(console: Console, title: str) -> None:
    console.print()
    console.print(_line(title, "bold"))


def _rows(console: Console, rows: list[tuple[str, ...]], right: frozenset[int] = frozenset()) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        table.add_column(justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(
            *(_line(("  " if not index else "") + cell, _style(cell)) for index, cell in enumerate(row))
        )
    console.print(table)


def _style(cell: str) -> str:
    return {"pass": "green", "FAIL": "bold red"}.get(cell, "")


def _print_taught(console: Console, report: Report) -> None:
    if rows := taught_rows(report):
        _heading(console, "How it was taught")
        _rows(console, rows)
        for note in taught_notes(report):
            console.print(_line(f"  {note}", "dim"))


def _print_sizes(console: Console, report: Report) -> None:
    _heading(console, "Size")
    rows: list[tuple[str, ...]] = [("source", words.megabytes(report.model.source_bytes), "", "")]
    for result in report.formats:
        artifact = result.artifact
        size = words.megabytes(artifact.bytes)
        rows.append((artifact.format, size, words.size_line(report, result), artifact.path.as_posix()))
        rows += [
            (each.name, words.megabytes(each.bytes), f"adapter of rank {each.rank}", each.path.as_posix())
            for each in result.adapters
        ]
    _rows(console, rows, right=frozenset({1}))


def _print_passes(console: Console, report: Report) -> None:
    if not report.passes:
        return
    _heading(console, "Passes")
    for row in report.passes:
        sizes = f"{words.megabytes(row.bytes_before)} -> {words.megabytes(row.bytes_after)}"
        error = "" if row.error is None else f", relative squared error {words.figure(row.error)}"
        console.print(_line(f"  {row.name} {words.options(row)}".rstrip(), ""))
        console.print(_line(f"    {sizes} in {words.seconds(row.seconds)}{error}", ""))
        console.print(_line(f"    {row.changed} weights changed, {len(row.skipped)} skipped", ""))
        for count, reason, names in words.grouped_reasons(row.skipped):
            console.print(_line(f"    skipped {count}: {reason} ({names})", "dim"))


def _print_fidelity(console: Console, result: FormatResult) -> None:
    verdict = "" if result.quality is not None else ": not compared with the source"
    _heading(console, f"Fidelity of {result.artifact.format}{verdict}")
    rows: list[tuple[str, ...]] = []
    for check in result.checks:
        value = "" if check.value is None else words.figure(check.value)
        rows.append(("pass" if check.passed else "FAIL", check.name, value, words.limit(check)))
    if rows:
        _rows(console, rows, right=frozenset({2}))
    # What passed needs no words; what failed needs them at full width.
    for check in result.checks:
        if not check.passed:
            console.print(_line(f"  {check.name}: {check.detail}", "red"))


def _print_speed(console: Console, result: FormatResult) -> None:
    rows: list[tuple[str, ...]] = list(words.speed_rows(result))
    if rows:
        _heading(console, f"Speed of {result.artifact.format} ({words.where_measured(result)})")
        _rows(console, rows, right=frozenset({1}))
    if taken := words.delegation(result):
        if result.delegation is not None and result.delegation.predicted:
            _heading(console, f"Units and memory of {result.artifact.format}, predicted and not measured")
        elif not rows:
            _heading(console, f"Fast kernels of {result.artifact.format}")
        console.print(_line(f"  {taken}", "dim"))
        for line in (*words.units(result), *words.load_memory(result)):
            console.print(_line(f"  {line}", "dim"))


def to_html(report: Report) -> str:
    """Return one self-contained page: no script, no request to anywhere, readable on a phone."""
    from slm_export.reports.page.report_page import report_page

    return report_page(report)
