"""Measurements on several devices as one table, a row for each, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.bench import show
from slm_export.bench.figures import Conditions, Measurement, Spread
from slm_export.bench.fleet import DeviceResult
from slm_export.reports.words import printable

_NONE = "-"


def to_json(results: Sequence[DeviceResult]) -> dict[str, Any]:
    """Return every device's measurements as `show.to_json` has them, or the reason why there are none."""
    empty: dict[str, Any] = {"measurements": [], "ratios": []}
    return {
        "devices": [
            {
                "device": one.device,
                "error": one.error,
                "exit_code": one.exit_code,
                **(show.to_json(one.measurements) if one.measurements else empty),
            }
            for one in results
        ]
    }


def print_fleet(console: Console, results: Sequence[DeviceResult]) -> None:
    """Print a row per device and artifact, medians; then what the devices noted, and why some failed."""
    measured = [found for one in results for found in one.measurements]
    failed = [one for one in results if one.error is not None]
    console.print(f"{len(results) - len(failed)} of {len(results)} devices measured; medians")
    if measured:
        # A narrow terminal wraps the lines; cutting cells would lose figures.
        Console(file=console.file, width=show.WIDEST, highlight=False).print(_table(measured))
    for note, where in _notes(measured).items():
        console.print(Text(printable(f"note: {note}{where}"), "dim"))
    for one in failed:
        console.print(Text(printable(f"FAIL {one.device}: {one.error}"), "red"))


def _table(measured: Sequence[Measurement]) -> Table:
    rows = [_cells(found) for found in measured]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in ("device", "artifact", *heads):
        table.add_column(head, justify="left" if head in ("device", "artifact") else "right", no_wrap=True)
    for found, row in zip(measured, rows, strict=True):
        names = (printable(found.where), printable(found.name))
        table.add_row(*map(Text, names), *(Text(printable(row.get(head, _NONE))) for head in heads))
    return table


def _cells(found: Measurement) -> Mapping[str, str]:
    """Return the figures of a row: heading -> words."""
    cells = {"load, ms": _median(found.warm_load_ms)}
    for speed in found.prefill:
        if found.generates:
            cells[f"prefill {speed.tokens}, tok/s"] = _median(speed.tokens_per_s)
        else:
            cells[f"{speed.tokens} tokens, ms"] = _median(speed.ms)
    cells |= {f"decode {speed.tokens}, tok/s": _median(speed.tokens_per_s) for speed in found.decode}
    if found.sustained:
        cells["lowest sustained, tok/s"] = f"{min(one.tokens_per_s for one in found.sustained):,.1f}"
    cells["peak, MiB"] = _NONE if found.peak_rss_mb is None else f"{found.peak_rss_mb:,.1f}"
    cells["°C"] = f"{_degrees(found.before)}..{_degrees(found.after)}"
    cells["throttling"] = found.after.throttling or _NONE
    return cells


def _notes(measured: Sequence[Measurement]) -> Mapping[str, str]:
    """Return every note once, with the devices that it is of where not all noted it."""
    notes = dict.fromkeys(note for found in measured for note in found.notes)
    by_note = {note: [found.where for found in measured if note in found.notes] for note in notes}
    return {
        note: "" if len(where) == len(measured) else f" ({', '.join(dict.fromkeys(where))})"
        for note, where in by_note.items()
    }


def _median(found: Spread | None) -> str:
    return _NONE if found is None else f"{found.median:,.1f}"


def _degrees(state: Conditions) -> str:
    return "?" if state.temperature_c is None else f"{state.temperature_c:.0f}"
