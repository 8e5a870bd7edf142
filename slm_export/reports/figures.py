"""The figures that bundles are compared by: what each is called, how it reads, and which way is better.

    figures_of  the figures of one artifact, by the names that the manifest has for them
    measured    the same, out of values by those names
    change      how a figure moved: a share of the old value for sizes and speed, a difference for fidelity

A figure that was not measured is absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slm_export.bundles.manifest import Manifest
from slm_export.reports.words import figure, megabytes

Group = Literal["size", "fidelity", "speed"]


@dataclass(frozen=True)
class Figure:
    """One figure of an artifact."""

    name: str
    label: str
    group: Group
    better: Literal["lower", "higher"]
    unit: str = ""

    @property
    def relative(self) -> bool:
        """Whether a change of it is told as a share of the old value."""
        return self.group != "fidelity"

    def show(self, value: float | None) -> str:
        """Return a value as it reads, or a dash."""
        if value is None:
            return "–"
        if self.unit == "bytes":
            return megabytes(round(value))
        if self.group == "speed":
            return f"{value:,.1f} {self.unit}"
        return f"{figure(value)} {self.unit}".strip()

    def show_change(self, old: float | None, new: float | None) -> str:
        """Return ``+3.2 %`` or ``-0.0012``; empty where it did not move or cannot be told."""
        moved = self.change(old, new)
        if not moved:
            return ""
        return f"{100 * moved:+.1f} %" if self.relative else f"{moved:+.3g}"

    def change(self, old: float | None, new: float | None) -> float | None:
        """Return how far it moved: (new - old) / old where relative, else new - old; None where it cannot be told."""
        if old is None or new is None or not (math.isfinite(old) and math.isfinite(new)):
            return None
        if self.relative:
            return (new - old) / old if old else None
        return new - old

    def is_worse(self, old: float | None, new: float | None) -> bool:
        """Return whether it moved the wrong way."""
        moved = self.change(old, new)
        return bool(moved) and ((moved or 0) > 0) == (self.better == "lower")


FIGURES: tuple[Figure, ...] = (
    Figure("bytes", "size", "size", "lower", "bytes"),
    Figure("bits_per_weight", "bits per weight", "size", "lower"),
    Figure("kl_mean", "mean KL divergence", "fidelity", "lower", "nats"),
    Figure("top1_agreement", "same likeliest token", "fidelity", "higher"),
    Figure("perplexity_ratio", "perplexity ratio", "fidelity", "lower"),
    Figure("greedy_agreement", "agreement on own texts", "fidelity", "higher"),
    Figure("cosine_mean", "mean cosine", "fidelity", "higher"),
    Figure("cosine_min", "least cosine", "fidelity", "higher"),
    Figure("agreement", "same decision", "fidelity", "higher"),
    Figure("max_abs", "largest difference of scores", "fidelity", "lower"),
    Figure("decode_tokens_per_s", "decode", "speed", "higher", "tokens/s"),
    Figure("prefill_tokens_per_s", "prefill", "speed", "higher", "tokens/s"),
    Figure("time_to_first_token_ms", "time to first token", "speed", "lower", "ms"),
    Figure("latency_ms", "median call", "speed", "lower", "ms"),
    Figure("load_ms", "load", "speed", "lower", "ms"),
    Figure("model_rss_mb", "memory of the model", "speed", "lower", "MiB"),
)
BY_NAME: Mapping[str, Figure] = {one.name: one for one in FIGURES}


def figures_of(manifest: Manifest, format: str) -> dict[str, float]:
    """Return the figures of one artifact that were measured; of percentiles the median."""
    artifact = manifest.artifact(format)
    found: dict[str, object] = {"bytes": artifact.bytes, "bits_per_weight": artifact.bits_per_weight}
    found |= manifest.quality.get(format) or {}
    found |= manifest.latency.get(format) or {}
    return measured(found)


def measured(found: Mapping[str, object]) -> dict[str, float]:
    """Return those of the figures among values by name that were measured; of percentiles the median."""
    values = {
        name: value.get("p50") if isinstance(value, Mapping) else value for name, value in found.items()
    }
    return {
        one.name: float(value)
        for one in FIGURES
        if isinstance(value := values.get(one.name), (int, float)) and not isinstance(value, bool)
    }
