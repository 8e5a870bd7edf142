"""Measurements as a table, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.bench.figures import Conditions, Instant, Measurement, Spread, ratios
from slm_export.reports.words import megabytes, printable

WIDEST = 1000
_NOT_MEASURED = "not measured"
_UNITS = {
    "bytes": "file",
    "cold load": "load from the disk, ms",
    "warm load": "load again, ms",
    "peak_rss_mb": "peak memory of the process, MiB",
    "model_rss_mb": "peak memory of the model, MiB",
}


def to_json(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return the measurements as JSON values, the first one's ratios to every other beside them."""
    first = measurements[0]
    return {
        "measurements": [dataclasses.asdict(found) for found in measurements],
        "ratios": [
            {
                "of": first.name,
                "to": other.name,
                "figures": {name: dataclasses.asdict(ratio) for name, ratio in ratios(first, other).items()},
            }
            for other in measurements[1:]
        ],
    }


def print_measurements(console: Console, measurements: Sequence[Measurement]) -> None:
    """Print a column per artifact, and for every other one the ratio of the first to it."""
    first, *others = measurements
    letters = ascii_uppercase[: len(measurements)]
    console.print(
        f"{printable(first.where)}, {_plural(first.threads, 'thread')}, {_plural(first.runs, 'run')}; "
        "medians (lowest..highest)"
    )
    for letter, found in zip(letters, measurements, strict=True):
        console.print(Text(f"{letter}  {printable(found.name)}, {found.format}, in {found.runtime}"))
    table = Table("", box=None, pad_edge=False)
    for letter in letters:
        table.add_column(letter, justify="right", no_wrap=True)
    for letter in letters[1:]:
        table.add_column(f"A / {letter}", justify="right", no_wrap=True)
    rows = [_rows(found) for found in measurements]
    compared = [ratios(first, other) for other in others]
    for key in dict.fromkeys(key for row in rows for key in row):
        cells = [row.get(key, _NOT_MEASURED) for row in rows]
        rate = ", tokens/s" if key.startswith(("prefill ", "decode ")) else ""
        table.add_row(_UNITS.get(key, key + rate), *cells, *(_ratio(found.get(key)) for found in compared))
    # A narrow terminal wraps the lines; cutting cells would lose figures.
    Console(file=console.file, width=WIDEST, highlight=False).print(table)
    for letter, found in zip(letters, measurements, strict=True):
        for line in _rest(found):
            console.print(Text(f"{letter}  {printable(line)}"))


def _rows(found: Measurement) -> Mapping[str, str]:
    """Return the cells of one artifact; where there is a ratio, the key is that of `ratios`."""
    rows = {
        "bytes": megabytes(found.bytes),
        "cold load": _spread(found.cold_load_ms),
        "warm load": _spread(found.warm_load_ms),
    }
    for speed in found.prefill:
        if found.generates:
            rows[f"prefill {speed.tokens}"] = _spread(speed.tokens_per_s)
            rows[f"first token after {speed.tokens}, ms"] = _spread(speed.ms)
        else:
            rows[f"{speed.tokens} tokens, ms"] = _spread(speed.ms)
    for speed in found.decode:
        rows[f"decode {speed.tokens}"] = _spread(speed.tokens_per_s)
    for name in ("peak_rss_mb", "model_rss_mb"):
        value = getattr(found, name)
        rows[name] = _NOT_MEASURED if value is None else f"{value:,.1f}"
    return rows


def _rest(found: Measurement) -> list[str]:
    states = {"before": _state(found.before), "after": _state(found.after)}
    told = "; ".join(f"{when}: {state}" for when, state in states.items() if state)
    lines = [_sustained(found.sustained)] if found.sustained else []
    return [*lines, *([told] if told else []), *(f"note: {note}" for note in found.notes)]


def _state(state: Conditions) -> str:
    parts = [
        None if state.temperature_c is None else f"{state.temperature_c:.0f} °C",
        None if state.throttling is None else f"throttling {state.throttling}",
        None if state.available_mb is None else f"{state.available_mb:,.0f} MiB of memory free",
    ]
    return ", ".join(part for part in parts if part)


def _sustained(instants: Sequence[Instant]) -> str:
    third = max(1, len(instants) // 3)
    start, end = (Spread.of(i.tokens_per_s for i in part) for part in (instants[:third], instants[-third:]))
    assert start
    assert end
    text = (
        f"for {instants[-1].at_s:.0f} s: {start.median:,.1f} tok/s in the first third, {end.median:,.1f} in the last "
        f"({end.median / start.median:.2f}), lowest {min(i.tokens_per_s for i in instants):,.1f}"
    )
    hottest = max((i.temperature_c for i in instants if i.temperature_c is not None), default=None)
    throttled = dict.fromkeys(i.throttling for i in instants if i.throttling)
    text += "" if hottest is None else f", up to {hottest:.0f} °C"
    return text + (f", throttling {', '.join(throttled)}" if throttled else "")


def _spread(found: Spread | None) -> str:
    if found is None:
        return _NOT_MEASURED
    digits = 1 if found.median < 1000 else 0
    low, middle, high = (f"{value:,.{digits}f}" for value in (found.low, found.median, found.high))
    return f"{middle} ({low}..{high})"


def _ratio(found: Spread | None) -> str:
    return "" if found is None else f"{found.median:.3f}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"
