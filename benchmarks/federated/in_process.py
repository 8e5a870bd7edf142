"""Rounds of a federation in one process: what server and clients run, without Flower between."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from slm_export.federated.aggregation import mean, private_mean, weights_of
from slm_export.federated.base import Base, start
from slm_export.federated.examples import Examples
from slm_export.federated.local import train
from slm_export.federated.noise import gaussian
from slm_export.federated.settings import Local, Privacy
from slm_export.federated.updates import Tensors, Update


@dataclass(frozen=True)
class Rounds:
    """How often, with whom, and how private."""

    number: int
    fraction: float
    """Probability of each client, by itself."""
    clip: float = 1.0
    noise: float | None = None
    """Over the clip; None: plain averaging."""


def together(base: Base, clients: Sequence[Examples], local: Local, rounds: Rounds, seed: int) -> Tensors:
    """Return what all clients learned together."""
    tensors, chance, drawn = dict(start(base)), random.Random(seed), itertools.count(seed * 1_000_003)
    for number in range(rounds.number):
        updates = []
        for client, examples in enumerate(clients):
            if chance.random() < rounds.fraction:
                learned = train(base, tensors, examples, local, Privacy(), seed + number)
                step = {name: learned.tensors[name] - tensors[name] for name in tensors}
                updates.append(Update(client, step, len(examples), {}))
        if rounds.noise is not None:
            expected = rounds.fraction * len(clients)
            change = private_mean(
                updates,
                tensors,
                rounds.clip,
                rounds.noise,
                expected,
                lambda shape: gaussian(shape, next(drawn)),
            )
        elif updates:
            change = mean(updates, weights_of(updates, None))
        else:
            continue
        tensors = {name: tensors[name] + change[name] for name in tensors}
    return tensors
