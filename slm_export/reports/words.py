"""How figures read to a person, the same on the terminal and on the page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from slm_export.gates import Gates
from slm_export.results import Check, FormatResult, Pair, PassRow, Report, TokenLatency

_SAME_REASON = re.compile(r"\d+")


def megabytes(count: int) -> str:
    """Return a size in decimal units, as app stores count: ``3.9 MB``."""
    if count >= 1_000_000_000:
        return f"{count / 1e9:.2f} GB"
    if count >= 1_000_000:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.1f} kB" if count >= 1000 else f"{count} bytes"


def parameters(count: int) -> str:
    """Return ``5.5 M`` or ``1.24 B``."""
    return f"{count / 1e9:.2f} B" if count >= 1_000_000_000 else f"{count / 1e6:.1f} M"


def seconds(value: float) -> str:
    """Return ``0.42 s``, ``12.3 s`` or ``3 min 20 s``."""
    if value >= 100:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def figure(value: float | None) -> str:
    """Return four significant digits, or ``not measured``."""
    if value is None:
        return "not measured"
    if isinstance(value, int) or abs(value) >= 10000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def printable(text: str) -> str:
    """Show control characters instead of sending them to the terminal: names come from strangers."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def change(before: int, after: int) -> str:
    """Return ``5.7x smaller`` or ``1.2x larger``."""
    if not before or not after:
        return ""
    return f"{before / after:.1f}x smaller" if after <= before else f"{after / before:.1f}x larger"


def parity_rows(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Return the table of formats beside each other, a header first."""
    if not pairs:
        return []
    rows = [("formats", "codes and scales", "largest difference", *_parity_heads(pairs[0]))]
    for pair in pairs:
        codes = (
            f"{len(pair.differing)} of {pair.matrices} differ"
            if pair.differing
            else f"same in all {pair.matrices}"
        )
        rows.append((" / ".join(pair.formats), codes, figure(pair.max_abs), *_parity_figures(pair)))
    return rows


def _parity_heads(pair: Pair) -> tuple[str, ...]:
    if pair.cosine_min is not None:
        return ("cosine mean", "cosine min")
    return ("top-1", "KL mean", "same greedy tokens")[: 2 + (pair.greedy_tokens is not None)]


def _parity_figures(pair: Pair) -> tuple[str, ...]:
    if pair.cosine_min is not None:
        return figure(pair.cosine_mean), figure(pair.cosine_min)
    greedy = () if pair.greedy_tokens is None else (f"{pair.greedy_agreed} of {pair.greedy_tokens}",)
    return (figure(pair.top1_agreement), figure(pair.kl_mean), *greedy)


def delegation(result: FormatResult) -> str:
    """Say what share of an artifact its fast kernels take, and what they leave."""
    found = result.delegation
    if found is None:
        return ""
    rest = ", ".join(f"{name} {count}" for name, count in sorted(found.rest.items()))
    shares = (
        f"{found.delegate} takes {found.taken} of {found.operators} operators of {found.function}, "
        f"{100 * found.accelerated:.1f}% of the multiply-adds"
    )
    return f"{shares}; left: {rest}" if rest else shares


def units(result: FormatResult) -> list[str]:
    """Say what share of the multiply-adds may run on each unit, and what is known to keep operators off it."""
    found = result.delegation
    if found is None:
        return []
    lines = []
    for unit, share in found.units.items():
        lines.append(f"{unit}: by what is publicly known, may take {100 * share:.1f}% of the multiply-adds")
        for risk in (risk for risk in found.risks if risk.unit == unit):
            count = sum(risk.operators.values())
            affected = 100 * risk.multiplications / max(1, found.multiplications)
            lines.append(f"  {count} operators, {affected:.1f}%: {risk.reason} ({risk.source})")
    return lines


def load_memory(result: FormatResult) -> list[str]:
    """Say what the constants of an artifact take once it is loaded, and on what that depends."""
    if result.delegation is None or (found := result.delegation.memory) is None:
        return []
    lines = [f"constants as they are stored: {megabytes(found.packed_bytes)}"]
    if found.expanded_bytes != found.packed_bytes:
        lines[0] += f", {found.packed_when}"
        lines.append(
            f"constants, all of them expanded: {megabytes(found.expanded_bytes)}, {found.expanded_when}"
        )
    return lines + ([f"states: {megabytes(found.state_bytes)}"] if found.state_bytes else [])


def limit(check: Check) -> str:
    """Return ``at most 0.05``; which side a limit is on is known from the name of its threshold."""
    if check.limit is None:
        return ""
    side, name = "limit", check.name.rpartition(": ")[2]  # behind the name of an adapter
    if f"max_{name}" in Gates.model_fields:
        side = "at most"
    elif f"min_{name}" in Gates.model_fields:
        side = "at least"
    return f"{side} {figure(check.limit)}"


def options(row: PassRow) -> str:
    """Return the options of a pass as ``bits=4 group=32``; of a table how many names it has."""
    shown = {
        key: f"({len(value)} names)" if isinstance(value, Mapping) else value
        for key, value in row.options.items()
        if value is not None and value != {}
    }
    return " ".join(f"{key}={value}" for key, value in shown.items())


def grouped_reasons(skipped: Mapping[str, str], show: int = 3) -> list[tuple[int, str, str]]:
    """Return (how many, reason, first few names) per reason, the commonest first.

    Reasons that differ only in their numbers ("30 columns ...", "34 columns ...") are one reason.
    """

    def kind(item: tuple[str, str]) -> str:
        return _SAME_REASON.sub("N", item[1])

    rows = []
    for _, group in groupby(sorted(skipped.items(), key=lambda item: (kind(item), item[0])), key=kind):
        items = list(group)
        names = ", ".join(name for name, _ in items[:show])
        more = f" and {len(items) - show} more" if len(items) > show else ""
        alike = "" if len({reason for _, reason in items}) == 1 else ", and the like"
        rows.append((len(items), items[0][1] + alike, names + more))
    return sorted(rows, key=lambda row: (-row[0], row[1]))


def size_line(report: Report, result: FormatResult) -> str:
    """Return ``5.7x smaller, 5.6 bits/weight`` for an artifact."""
    parts = [change(report.model.source_bytes, result.artifact.bytes)]
    if (bits := result.artifact.bits_per_weight) is not None:
        parts.append(f"{bits:.2f} bits/weight")
    return ", ".join(part for part in parts if part)


def speed_rows(result: FormatResult) -> list[tuple[str, str]]:
    """Return (what, how much) for every figure of speed and memory that was measured."""
    latency = result.latency
    if latency is None:
        return []
    rates: list[tuple[str, float | None, str]] = []
    if isinstance(latency, TokenLatency):
        rates += [
            ("decode", latency.decode_tokens_per_s, "tokens/s"),
            (f"prefill ({latency.prefill_tokens} tokens)", latency.prefill_tokens_per_s, "tokens/s"),
            ("time to first token", latency.time_to_first_token_ms, "ms"),
        ]
    else:
        rates += [
            (f"{name} at {latency.tokens} tokens", value, "ms") for name, value in latency.latency_ms.items()
        ]
    rates += [
        ("load", latency.load_ms, "ms"),
        ("peak memory of the process", latency.peak_rss_mb, "MiB"),
        ("peak memory of the model", latency.model_rss_mb, "MiB"),
    ]
    return [(name, f"{value:,.1f} {unit}") for name, value, unit in rates if value is not None]


def where_measured(result: FormatResult) -> str:
    """Return ``host CPU, 2 threads, median of 5 runs``."""
    latency = result.latency
    if latency is None:
        return ""
    return f"{latency.where}, {latency.threads} thread{'s' * (latency.threads != 1)}, {latency.runs} runs"


def quality_rows(result: FormatResult) -> list[tuple[str, str]]:
    """Return (name, value) for every figure of fidelity."""
    return [(name, figure(value)) for name, value in _quality_items(result) if not isinstance(value, str)]


def quality_texts(result: FormatResult) -> list[tuple[str, str]]:
    """Return (name, text) for what the artifact wrote, or the sentence it did worst on."""
    return [
        (name.replace("_", " "), value) for name, value in _quality_items(result) if isinstance(value, str)
    ]


def _quality_items(result: FormatResult) -> list[tuple[str, float | str | None]]:
    if result.quality is None:
        return []
    # What there is of some models alone is left out where it is not.
    optional = ("greedy_text", "worst_sentence", "same_tokens", "lacking_mass", "tokens_ratio")
    items = [item for item in dataclasses.asdict(result.quality).items() if item[0] != "examples"]
    return [(name, value) for name, value in items if value is not None or name not in optional]
