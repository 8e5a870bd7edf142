"""What became of every weight: how far it is from what it was, and what it takes.

changes_of  what one pass did to the values
rows_of     a row for every weight of a finished checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.fidelity.steps import StepErrors, steps_of, worst_of
from slm_export.reports.details import WeightRow
from slm_export.weights import Dense, Quantized, Weight, float_blocks

_BLOCK = 1 << 18  # values, which stay in the processor's cache
_IN_BLOCK = re.compile(r".+?\.(?P<layer>\d+)\.(?P<part>.+)")


@dataclass(frozen=True)
class Changes:
    """What one pass did to the weights that it changed; one of another shape than before is not among them."""

    error: float | None
    """sum |w - w'|^2 / sum |w|^2 over all of them; None of none."""
    errors: Mapping[str, float]
    """Of each by itself; one of zeros has none."""
    steps: StepErrors | None
    """Of those that came onto the integer grid; None of none."""


def changes_of(before: Checkpoint, after: Checkpoint) -> Changes:
    """Compare every weight that is another than before."""
    errors: dict[str, float] = {}
    rounded: list[StepErrors] = []
    total = total_norm = 0.0
    for name, weight in before.weights.items():
        changed = after.weights.get(name)
        if changed is None or changed is weight or changed.shape != weight.shape:
            continue
        distance = _Distance(weight, changed)
        if isinstance(weight, Dense) and isinstance(changed, Quantized):
            rounded.append(steps_of(name, changed, distance))
        else:
            for _ in distance:
                pass
        total, total_norm = total + distance.error, total_norm + distance.norm
        if distance.norm:
            errors[name] = distance.error / distance.norm
    return Changes(total / total_norm if total_norm else None, errors, worst_of(rounded))


def still_true(errors: Mapping[str, float], before: Checkpoint, after: Checkpoint) -> dict[str, float]:
    """Return the errors of the weights that a pass left as they are."""
    return {name: error for name, error in errors.items() if after.weights.get(name) is before.weights[name]}


def rows_of(checkpoint: Checkpoint, errors: Mapping[str, float]) -> tuple[WeightRow, ...]:
    """Return a row for every weight, in the checkpoint's order; ``errors`` by name, where one is known."""
    return tuple(
        WeightRow(
            name=name,
            role=checkpoint.roles[name],
            layer=layer_of(name)[0],
            part=layer_of(name)[1],
            values=weight.count,
            bits=8 * weight.dtype.itemsize if isinstance(weight, Dense) else weight.bits,
            bytes=weight.bytes,
            error=errors.get(name),
        )
        for name, weight in checkpoint.weights.items()
    )


def layer_of(name: str) -> tuple[int | None, str]:
    """Return the number of the block that a weight is in and what it is there: (3, "self_attn.q_proj")."""
    whole = name.removesuffix(".weight")
    match = _IN_BLOCK.fullmatch(whole)
    return (int(match["layer"]), match["part"]) if match else (None, whole)


class _Distance:
    """Differences of two weights, block by block of rows; their squares are summed as they go by."""

    def __init__(self, weight: Weight, changed: Weight) -> None:
        self._sides = (weight, changed)
        self.error = self.norm = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        for old, new in zip(*(float_blocks(side, _BLOCK) for side in self._sides), strict=True):
            difference = new - old
            self.norm += _square(old)
            self.error += _square(difference)
            yield difference


def _square(x: Tensor) -> float:
    # Row by row, because one sum over all is cut among threads, and its last digits follow from how many there are.
    # One pass over the values, where a product and a sum are two.
    rows: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return rows.square().sum(dtype=torch.float64).item()
