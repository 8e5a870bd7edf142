"""Words of the report's page that the terminal has no use for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slm_export.reports.details import Divergence, FrontierPoint, Furthest
from slm_export.reports.words import figure, limit, megabytes, parameters
from slm_export.results import Check, EmbeddingQuality, FormatResult, Report, ScoreQuality, TokenQuality

_TITLES: Mapping[str, str] = {
    "bytes": "Size of the file",
    "kl_mean": "Divergence from the source, mean",
    "kl_p99": "Divergence from the source, 99th percentile",
    "kl_max": "Divergence from the source, largest",
    "top1_agreement": "Same likeliest token",
    "perplexity_ratio": "Perplexity over that of the source",
    "greedy_agreement": "Long texts of its own, as the source would write them",
    "lowering_kl_mean": "Loss by lowering, mean divergence",
    "lowering_max_abs": "Loss by lowering, largest difference of logits",
    "prompt_kl_max": "Prompts read at once, turn by turn, largest divergence",
    "degeneration": "No loop that the source would not enter",
    "stopping": "Stops where the source would",
    "codes": "Integers in the file are the checkpoint's",
    "stop_tokens": "Stop tokens in the file",
    "runner_text": "The vendor's runner writes the same text",
    "tokenizer_agreement": "The runtime's tokenizer reads as the source's",
    "cosine_mean": "Cosine to the source, mean",
    "cosine_min": "Cosine to the source, least",
    "agreement": "Same decision as the source",
    "max_abs": "Largest difference of scores",
    "decode_tokens_per_s": "Speed of decoding",
    "prefill_tokens_per_s": "Speed of reading a prompt",
    "time_to_first_token_ms": "Time to the first token",
    "latency_ms": "Median time of a call",
    "accelerated": "Share of the work that is accelerated",
}


def check_title(name: str) -> str:
    """Return what a check is about, in words; its own name where there are none."""
    return _TITLES.get(name, name.replace("_", " ").capitalize())


def check_value(check: Check) -> str:
    """Return the value of a check; of a size with its unit."""
    if check.value is None:
        return ""
    return megabytes(round(check.value)) if check.name == "bytes" else figure(check.value)


def check_limit(check: Check) -> str:
    """Return ``at most 8.0 MB`` or ``at least 0.9``."""
    if check.name == "bytes" and check.limit is not None:
        return f"at most {megabytes(round(check.limit))}"
    return limit(check)


def asked_rows(report: Report) -> list[tuple[str, str]]:
    """Return (what, value) of what the user asked for beside the device, a table of gates key by key."""
    rows = [
        (name.replace("_", " "), _plain(value))
        for name, value in report.asked.items()
        if name not in ("device", "target") and not isinstance(value, Mapping)
    ]
    rows += [("formats", ", ".join(result.artifact.format for result in report.formats))]
    for name, value in report.asked.items():
        if isinstance(value, Mapping):
            limits = ", ".join(f"{key} = {_plain(item)}" for key, item in value.items())
            rows.append((f"own {name}", limits))
    return [(name, value) for at, (name, value) in enumerate(rows) if name not in dict(rows[:at])]


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return figure(value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def examples(result: FormatResult) -> tuple[Divergence, ...]:
    """Return the places where a decoder parts from its source."""
    return result.quality.examples if isinstance(result.quality, TokenQuality) else ()


def furthest(result: FormatResult) -> tuple[Furthest, ...]:
    """Return the texts on which an encoder is furthest from its source."""
    quality = result.quality
    return quality.examples if isinstance(quality, (EmbeddingQuality, ScoreQuality)) else ()


def frontier_rows(points: Sequence[FrontierPoint]) -> list[tuple[str, str, str, str]]:
    """Return recipe, size, predicted and measured perplexity ratio of every point, smallest first."""
    return [
        (
            f"{point.label} (this bundle)" if point.chosen else point.label,
            megabytes(point.bytes),
            _ratio(point.predicted_perplexity_ratio),
            _ratio(point.measured_perplexity_ratio),
        )
        for point in sorted(points, key=lambda point: point.bytes)
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else figure(value)


def count(values: int) -> str:
    """Return ``1.4 M``, ``33 k`` or ``256``."""
    if values >= 1_000_000:
        return parameters(values)
    return f"{values / 1e3:.0f} k" if values >= 10_000 else f"{values:,}"


def visible(token: str) -> str:
    """Return a token with its blanks made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "(nothing)"
