"""Examples dealt out to clients, for simulations: alike, or each with topics of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slm_export.errors import InputError

Parts = tuple[tuple[int, ...], ...]
"""Of every client, the indices of its examples, rising. Together they are all examples, each once."""


def uniform(count: int, clients: int, seed: int) -> Parts:
    """Deal out examples by chance alone; the sizes differ by one at most.

    Raises:
        InputError: fewer examples than clients.
    """
    sizes = _sizes(count, clients)
    order = np.random.default_rng(seed).permutation(count)
    return _parts(np.split(order, np.cumsum(sizes)[:-1]))


def dirichlet(topics: Sequence[int], clients: int, alpha: float, seed: int) -> Parts:
    """Deal out examples to clients that differ in what they write about; the sizes differ by one at most.

    Every client draws its mixture of topics from Dir(alpha * p), p being the shares of the topics in all examples, and
    then examples by that mixture, from what is left (Hsu, Qi and Brown, "Measuring the effects of non-identical data
    distribution", 2019). A large alpha makes all clients alike; a small one gives each a single topic.

    Raises:
        InputError: fewer examples than clients, or an alpha that is not more than 0.
    """
    if not alpha > 0:
        raise InputError(f"alpha = {alpha}: it must be more than 0")
    sizes = _sizes(len(topics), clients)
    chance = np.random.default_rng(seed)
    found, topic_of = np.unique(np.asarray(topics), return_inverse=True)
    left = [chance.permutation(np.flatnonzero(topic_of == topic)).tolist() for topic in range(len(found))]
    prior = np.array([len(one) for one in left]) / len(topics)
    mixtures = chance.dirichlet(np.maximum(alpha * prior, np.finfo(float).tiny), clients)
    parts = []
    for size, mixture in zip(sizes, mixtures, strict=True):
        part = []
        for _ in range(size):
            counts = np.array([len(one) for one in left])
            weights = np.where(counts > 0, mixture, 0.0)
            if not weights.sum() > 0:  # nothing is left of its topics: it takes of the others as they come
                weights = counts.astype(float)
            part.append(left[chance.choice(len(left), p=weights / weights.sum())].pop())
        parts.append(np.array(part))
    return _parts(parts)


def _sizes(count: int, clients: int) -> list[int]:
    if clients < 1:
        raise InputError(f"{clients} clients: at least one is needed")
    if count < clients:
        raise InputError(
            f"{count} examples for {clients} clients: each needs one; give more text, or fewer clients"
        )
    return [len(part) for part in np.array_split(np.empty(count), clients)]


def _parts(parts: Sequence[np.ndarray]) -> Parts:
    return tuple(tuple(int(index) for index in np.sort(part)) for part in parts)
