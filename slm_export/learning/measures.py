"""Figures with how sure they are: means over held-out documents, and shares of right answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_DRAWS = 2000
_SEED = 11
_FEW = 10
"""Documents; with fewer, windows are drawn in their place."""


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that holds it with a confidence of 95%."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"

    def through(self, function: Callable[[float], float]) -> Interval:
        """Return the figure and its interval through a rising function, such as exp."""
        return Interval(function(self.value), function(self.low), function(self.high))

    def apart(self, other: Interval) -> bool:
        """Whether the two intervals have nothing in common."""
        return self.high < other.low or other.high < self.low


def mean(sums: Sequence[float], weights: Sequence[float], groups: Sequence[int]) -> Interval:
    """Return the weighted mean, with a percentile bootstrap over groups (Efron, 1979).

    Given   sums, weights, groups: of every window the sum of a figure, over how many tokens, and its document. Windows
            of one document are alike, so documents are drawn; windows, where there are fewer than ten documents
    """
    total, weight = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    found, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(found) < _FEW:
        index = np.arange(len(total))
    count = int(index.max()) + 1
    by_group = np.bincount(index, total, count), np.bincount(index, weight, count)
    drawn = np.random.default_rng(_SEED).integers(0, count, (_DRAWS, count))
    means = by_group[0][drawn].sum(1) / by_group[1][drawn].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(total.sum() / weight.sum()), float(low), float(high))


def share(right: int, of: int) -> Interval:
    """Return a share of right answers with Wilson's interval (Wilson, 1927)."""
    if of < 1:
        raise ValueError("a share of nothing")
    z, p = 1.959964, right / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    # Where none or all are right the bound is 0 or 1, and rounding leaves it a hair beside.
    low, high = 0.0 if right == 0 else middle - half, 1.0 if right == of else middle + half
    return Interval(p, max(0.0, low), min(1.0, high))
