"""Updates -> one update.

mean            weighted by examples (McMahan et al., "Communication-Efficient Learning of Deep Networks from
                Decentralized Data", 2017); weights are bounded, so that nobody counts for the rest
median          of each value (Yin et al., "Byzantine-Robust Distributed Learning", 2018)
trimmed mean    of each value, without the largest and smallest (the same)
private mean    every update clipped, Gaussian noise on the sum, divided by a number that is fixed beforehand
                (McMahan et al., "Learning Differentially Private Recurrent Language Models", 2018)

Sums are taken in float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slm_export.federated.updates import Tensors, Update, norm_of

Array64 = NDArray[np.float64]
Noise = Callable[[tuple[int, ...]], Array64]
"""Shape -> values of the standard normal distribution."""


def weights_of(updates: Sequence[Update], largest: float | None) -> list[float]:
    """Return each update's share of a weighted mean.

    Given   largest: an update counts for at most so many times the median number of examples; None: all count alike
    """
    if largest is None:
        return [1 / len(updates)] * len(updates)
    bound = largest * statistics.median_low([update.examples for update in updates])
    counted = [min(float(update.examples), bound) for update in updates]
    return [count / sum(counted) for count in counted]


def mean(updates: Sequence[Update], weights: Sequence[float]) -> Tensors:
    """Return the weighted mean of updates, at least one."""
    return _by_value(updates, lambda stack: np.tensordot(np.asarray(weights), stack, axes=1))


def median(updates: Sequence[Update]) -> Tensors:
    """Return the median of each value."""
    return _by_value(updates, lambda stack: np.median(stack, axis=0))


def trimmed_mean(updates: Sequence[Update], share: float) -> Tensors:
    """Return the mean of each value without the ``share`` that is largest and the one that is smallest.

    Given   share: below 0.5; at least one is left out at either end where there are three updates or more
    """
    count = len(updates)
    cut = min(max(1, int(share * count)), (count - 1) // 2)
    return _by_value(updates, lambda stack: np.sort(stack, axis=0)[cut : count - cut].mean(axis=0))


def clipped(tensors: Tensors, bound: float) -> dict[str, Array64]:
    """Return tensors scaled to an L2 norm of at most ``bound``, over all of them together, in float64."""
    norm = norm_of(tensors)
    # a hair below, so that rounding does not lead above
    factor = bound / norm * (1 - 1e-12) if norm > bound else 1.0
    return {name: value.astype(np.float64) * factor for name, value in tensors.items()}


def private_mean(
    updates: Sequence[Update], like: Tensors, clip: float, noise: float, count: float, draw: Noise
) -> Tensors:
    """Return the mean that hides whether any one client took part.

    Given   updates: any number, none too; all weigh the same, because a weight of examples would break the bound
            like: tensors of the right names and shapes
            clip: L2 norm of an update at most; the sum changes by no more when a client is left out
            noise: standard deviation over ``clip`` of what is added to each value of the sum
            count: what the sum is divided by: clients expected, and not those that came
    Result  float32; what is done to it afterwards cannot make it less private
    """
    summed = {name: np.zeros(value.shape) for name, value in like.items()}
    for update in updates:
        for name, value in clipped(update.tensors, clip).items():
            summed[name] += value
    return noised_sum(summed, noise * clip, count, draw)


def noised_sum(summed: Mapping[str, Array64], deviation: float, count: float, draw: Noise) -> Tensors:
    """Return a sum with noise of a standard deviation on every value, divided by ``count``; float32."""
    return {
        name: ((value + deviation * draw(value.shape)) / count).astype(np.float32)
        for name, value in summed.items()
    }


def _by_value(updates: Sequence[Update], reduce: Callable[[Array64], Array64]) -> Tensors:
    assert updates, "a round without updates is not aggregated"
    return {
        name: np.asarray(
            reduce(np.stack([update.tensors[name].astype(np.float64) for update in updates]))
        ).astype(np.float32)
        for name in updates[0].tensors
    }
