"""Size against quality: what is the best to expect at every size, and what some of it measures.

A point is the best allocation of bits at its size. Measured is the model with those weights in torch, on the text that
artifacts are judged on; runtimes round activations besides, so an artifact is a little worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slm_export.budget.allocation import Limit, solve
from slm_export.budget.choices import INT8, Allocation, tables_of
from slm_export.budget.expectation import Expectation
from slm_export.checkpoint import Checkpoint
from slm_export.graph.model import build_reference
from slm_export.reports.details import FrontierPoint

POINTS = 12
MEASURED = 4
"""Points that are measured, spread over all."""


@dataclass(frozen=True)
class Point:
    """One allocation. ``quality``: perplexity ratio of a decoder, mean cosine of embeddings."""

    label: str
    bytes: int
    predicted: float | None
    measured: float | None
    chosen: bool
    allocation: Allocation

    @property
    def as_json(self) -> dict[str, Any]:
        """Return the point as JSON values, with what every matrix is stored in."""
        plain = {name: getattr(self, name) for name in ("label", "bytes", "predicted", "measured", "chosen")}
        return {**plain, **tables_of(self.allocation)}

    @property
    def shown(self) -> FrontierPoint:
        """Return the point as a report has it; of decoders."""
        return FrontierPoint(self.label, self.bytes, self.predicted, self.measured, self.chosen)


def frontier(expected: Expectation, chosen: Allocation | None) -> tuple[Point, ...]:
    """Return the best allocations from the smallest file to one of int8 throughout, the smallest first.

    Given   chosen: what is exported, which is a point too; None: nothing is
    """
    assert expected.loss is not None
    format = expected.formats[0]
    least = expected.size(format, expected.least())
    most = expected.size(format, dict.fromkeys(expected.options, INT8))
    found: list[Point] = []
    for number in range(POINTS):
        size = least * (most / least) ** (number / (POINTS - 1))
        limit = Limit("size", expected.encoded[format], expected.program[format], size + 1)
        allocation = solve(expected.options, expected.loss.costs, [limit])
        if allocation is not None and all(allocation != point.allocation for point in found):
            found.append(_point(expected, allocation, chosen=allocation == chosen))
    if chosen is not None and not any(point.chosen for point in found):
        found.append(_point(expected, chosen, chosen=True))
    return tuple(sorted(found, key=lambda point: point.bytes))


def measured(points: Sequence[Point], measure: Callable[[Allocation], float]) -> tuple[Point, ...]:
    """Return the points with some of them measured: the ends, some between, and the chosen one."""
    step = max(1, (len(points) - 1) // (MEASURED - 1))
    return tuple(
        replace(point, measured=measure(point.allocation)) if number % step == 0 or point.chosen else point
        for number, point in enumerate(points)
    )


def _point(expected: Expectation, allocation: Allocation, chosen: bool) -> Point:
    format, shapes = expected.formats[0], expected.checkpoint.weights
    figures = expected.figures(format, allocation)
    values = sum(shapes[name].count for name in allocation)
    bits = 8 * sum(choice.bytes(shapes[name].shape) for name, choice in allocation.items()) / values
    predicted = figures.get("perplexity_ratio", figures.get("cosine_mean"))
    return Point(f"{bits:.2f} bits per weight", round(figures["bytes"]), predicted, None, chosen, allocation)


@torch.no_grad()
def log_perplexity(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> float:
    """Return the mean negative log likelihood of a token, in nats."""
    model = build_reference(checkpoint)
    total, count = 0.0, 0
    for window in windows:
        logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0, :-1].float()
        following = torch.tensor(window[1:]).unsqueeze(1)
        total -= logits.log_softmax(-1).gather(1, following).sum().item()
        count += len(window) - 1
    return total / count


def ratio(source: float, other: float) -> float:
    """Return the ratio of two perplexities, of their logarithms."""
    return math.exp(min(other - source, 700.0))
