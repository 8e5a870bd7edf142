"""What the sections of a report's page show, worked out from the report; the template only writes it down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slm_export.gates import Gates
from slm_export.parity import judge_pairs
from slm_export.reports.details import WeightRow
from slm_export.reports.words import figure, megabytes, seconds, size_line, speed_rows
from slm_export.results import (
    Check,
    EmbeddingQuality,
    FormatResult,
    Report,
    ScoreQuality,
    TokenLatency,
    TokenQuality,
)

STEPS = 7
"""Shades of the table of errors."""
_SAME = 1.1
"""Errors whose largest is at most so many times the smallest get one shade: there is nothing to see."""


@dataclass(frozen=True)
class Verdict:
    """The first thing on the page: ``pass``, ``fail`` or ``open`` (something was not verified)."""

    kind: str
    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """One format at a glance."""

    format: str
    size: str
    detail: str
    figures: tuple[tuple[str, str], ...]
    checks: str
    state: str
    """As of `Verdict`."""


@dataclass(frozen=True)
class Bar:
    """A line of a bar chart; ``share`` in percent of the longest."""

    name: str
    text: str
    share: float


@dataclass(frozen=True)
class Shade:
    """An error, and how dark its cell is: 0 to `STEPS` - 1."""

    text: str
    step: int
    title: str


@dataclass(frozen=True)
class Heat:
    """Errors by block and part."""

    parts: tuple[str, ...]
    layers: tuple[tuple[int, tuple[Shade | None, ...]], ...]
    outside: tuple[tuple[str, Shade], ...]


def verdict(report: Report) -> Verdict:
    """Return whether the bundle may be shipped, in a line, and what speaks against it."""
    checks = [(result.artifact.format, check) for result in report.formats for check in result.checks]
    checks += [("formats", check) for check in judge_pairs(report.parity)]
    failed = [f"{where}: {check.name}: {check.detail}" for where, check in checks if not check.passed]
    if failed:
        return Verdict("fail", f"{len(failed)} of {len(checks)} checks failed: do not ship", tuple(failed))
    unverified = [result.artifact.format for result in report.formats if result.quality is None]
    if unverified:
        lines = tuple(f"{name} was not compared with its source" for name in unverified)
        return Verdict("open", "Not verified", lines)
    return Verdict("pass", f"All {len(checks)} checks passed", ())


def card(report: Report, result: FormatResult) -> Card:
    """Return the few figures of a format that decide."""
    passed = sum(check.passed for check in result.checks)
    checks = f"{passed} of {len(result.checks)} checks passed" if result.checks else "nothing checked"
    return Card(
        result.artifact.format,
        megabytes(result.artifact.bytes),
        size_line(report, result),
        (*_quality_figures(result), *_speed_figures(result)),
        checks,
        "fail" if not result.passed else "open" if result.quality is None else "pass",
    )


def _quality_figures(result: FormatResult) -> list[tuple[str, str]]:
    quality = result.quality
    found: list[tuple[str, float | None, str]] = []
    if isinstance(quality, TokenQuality):
        found = [
            ("perplexity", quality.perplexity_ratio, "change"),
            ("same likeliest token", quality.top1_agreement, "share"),
            ("mean KL divergence", quality.kl_mean, "nats"),
        ]
    elif isinstance(quality, EmbeddingQuality):
        found = [
            ("mean cosine to the source", quality.cosine_mean, ""),
            ("least cosine", quality.cosine_min, ""),
        ]
    elif isinstance(quality, ScoreQuality):
        found = [("same decision", quality.agreement, "share"), ("largest difference", quality.max_abs, "")]
    return [(name, _shown(value, unit)) for name, value, unit in found if value is not None]


def _shown(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "change":
        return f"{100 * (value - 1):+.2f} %"
    return f"{figure(value)} {unit}".strip()


def _speed_figures(result: FormatResult) -> list[tuple[str, str]]:
    latency = result.latency
    if latency is None:
        return []
    if isinstance(latency, TokenLatency):
        rate = latency.decode_tokens_per_s
        found = [] if rate is None else [(f"decode on {latency.where}", f"{rate:,.0f} tokens/s")]
    else:
        found = [
            (f"{name} on {latency.where}", f"{value:,.1f} ms")
            for name, value in latency.latency_ms.items()
            if name == "p50"
        ]
    if latency.model_rss_mb is not None:
        found.append(("memory of the model", f"{latency.model_rss_mb:,.0f} MiB"))
    return found


def headroom(check: Check) -> float | None:
    """Return what share of its allowance a check uses, in percent; None where it has no limit.

    Of an agreement or a cosine the allowance is what is missing to 1, of a perplexity ratio what exceeds it; of a
    least rate, the time that it leaves.
    """
    value, limit = check.value, check.limit
    if value is None or limit is None or not math.isfinite(value):
        return None
    if check.name == "perplexity_ratio" and limit > 1:
        used = (value - 1) / (limit - 1)
    elif f"min_{check.name}" not in Gates.model_fields:
        used = value / limit if limit else math.inf
    elif limit < 1 and value <= 1:
        used = (1 - value) / (1 - limit)
    else:
        used = limit / value if value > 0 else math.inf
    return max(0.0, min(100.0, 100 * used))


def size_bars(report: Report) -> list[Bar]:
    """Return sizes from the source through every pass to the artifacts."""
    sizes = [("source", report.model.source_bytes)]
    sizes += [(f"after {row.name}", row.bytes_after) for row in report.passes]
    sizes += [(result.artifact.format, result.artifact.bytes) for result in report.formats]
    largest = max(size for _, size in sizes) or 1
    return [Bar(name, megabytes(size), 100 * size / largest) for name, size in sizes]


def stage_bars(report: Report) -> list[Bar]:
    """Return wall time by stage."""
    longest = max(report.stages.values(), default=0.0) or 1.0
    return [Bar(name, seconds(value), 100 * value / longest) for name, value in report.stages.items()]


def beside_weights(report: Report, result: FormatResult) -> str:
    """Return what an artifact takes beside its weights: program, tokenizer, padding."""
    weights = sum(row.bytes for row in report.weights)
    rest = result.artifact.bytes - weights
    return f"{megabytes(rest)} of it beside the weights" if weights and rest >= 0 else ""


def heat(rows: Sequence[WeightRow]) -> Heat | None:
    """Return the errors by block and part; None where no weight was changed."""
    errors = [row for row in rows if row.error is not None]
    if not errors:
        return None
    inside = [row for row in errors if row.layer is not None]
    shades = {row.name: _shade(row, errors, blocks=bool(inside)) for row in errors}
    parts = tuple(dict.fromkeys(row.part for row in inside))
    by_place = {(row.layer, row.part): shades[row.name] for row in inside}
    layers = sorted({row.layer for row in inside if row.layer is not None})
    return Heat(
        parts,
        tuple((layer, tuple(by_place.get((layer, part)) for part in parts)) for layer in layers),
        tuple((row.part, shades[row.name]) for row in errors if row.layer is None),
    )


def _shade(row: WeightRow, errors: Sequence[WeightRow], *, blocks: bool) -> Shade:
    """Shades are steps of equal ratio between the smallest and the largest error."""
    # Of blocks, where there are any: an embedding is often in other bits, and would take all the shades.
    values = [other.error for other in errors if other.error and (other.layer is not None or not blocks)]
    assert row.error is not None
    step = 0
    if values and row.error > 0 and max(values) > _SAME * min(values):
        share = math.log(row.error / min(values)) / math.log(max(values) / min(values))
        step = max(0, min(STEPS - 1, int(share * STEPS)))
    return Shade(f"{row.error:.1e}".replace("e-0", "e-"), step, f"{row.name}, {row.bits} bits")


def speed_table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of the table of speed and memory: a row per figure, a column per format."""
    measured = [result for result in report.formats if result.latency is not None]
    columns = [dict(speed_rows(result)) for result in measured]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, "") for column in columns)) for name in names]
    return ("", *(result.artifact.format for result in measured)), rows


def predicted_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Return phase, predicted and measured time, and their ratio, for every prediction there is."""
    rows = []
    for result in report.formats:
        for prediction, phase in ((one, phase) for one in result.predictions for phase in one.phases):
            measured, ratio = "not measured", ""
            if phase.measured_s is not None:
                measured, ratio = (
                    _milliseconds(phase.measured_s),
                    f"{phase.measured_s / phase.predicted_s:.2f}",
                )
            where = f" on {prediction.where}" if len(result.predictions) > 1 else ""
            name = f"{result.artifact.format}{where}, {phase.name}"
            rows.append((name, _milliseconds(phase.predicted_s), measured, ratio))
    return rows


def _milliseconds(value: float) -> str:
    return f"{1000 * value:,.4g} ms"
