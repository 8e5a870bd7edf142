"""How far codes lie from the numbers that they stand for, in steps of the grid.

Nearest rounding is off by at most half a step, by 0.29 in the root mean square; passes that make up for errors
elsewhere (GPTQ) go up to 1.6 in single blocks. A block that a pass spoils (zeros, the scales of its neighbour) is off
by the size of its codes. What that costs the whole model may be little; that it is no rounding is seen here, block by
block.

Errors that all point the same way are another sign: a zero point that the grid does not have moves every value by one
step, and no block by more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_export.fidelity.judging import checks_of
from slm_export.gates import Gates
from slm_export.results import Check
from slm_export.weights import Quantized

_BLOCK = 32
"""Columns; every group is some such blocks."""


@dataclass(frozen=True)
class StepErrors:
    """The worst that was found, in steps (1 is the scale of the group), and where."""

    rounding_steps: float = 0.0
    """Root mean square over a block of 32 neighbouring columns of one row."""
    rounding_bias: float = 0.0
    """Absolute mean over a matrix."""
    furthest: str = ""
    most_biased: str = ""


def steps_of(name: str, weight: Quantized, errors: Iterable[Tensor]) -> StepErrors:
    """Return what became of one matrix.

    Given   errors: new values less old ones, float32, in blocks of whole rows, (rows, in) each
    """
    total, row, furthest = 0.0, 0, StepErrors()
    scales = weight.scales
    for error in errors:
        steps = error.view(error.shape[0], scales.shape[1], -1) / scales[row : row + error.shape[0], :, None]
        steps = steps.flatten(1)
        # Row by row: one sum over all follows, in its last digits, from the number of threads.
        total += steps.sum(-1, dtype=torch.float64).sum().item()
        size = _BLOCK if steps.shape[1] % _BLOCK == 0 else steps.shape[1]
        blocks = steps.view(steps.shape[0], -1, size).square().mean(-1)
        worst = int(blocks.argmax())
        far = blocks.view(-1)[worst].sqrt().item()
        if _or_infinite(far) > _or_infinite(furthest.rounding_steps):
            at, column = row + worst // blocks.shape[1], worst % blocks.shape[1] * size
            furthest = StepErrors(far, furthest=f"{name}, row {at}, columns {column} to {column + size - 1}")
        row += error.shape[0]
    return StepErrors(furthest.rounding_steps, abs(total) / weight.count, furthest.furthest, name)


def worst_of(found: Iterable[StepErrors | None]) -> StepErrors | None:
    """Return the furthest and the most biased of several; None of none."""
    there = [one for one in found if one is not None]
    if not there:
        return None
    far = max(there, key=lambda one: _or_infinite(one.rounding_steps))
    biased = max(there, key=lambda one: _or_infinite(one.rounding_bias))
    return StepErrors(far.rounding_steps, biased.rounding_bias, far.furthest, biased.most_biased)


def _or_infinite(x: float) -> float:
    """Return what can be compared: NaN is worse than any number."""
    return math.inf if math.isnan(x) else x


def judge_steps(found: StepErrors | None, gates: Gates) -> tuple[Check, ...]:
    """Hold what passes did to matrices against its bounds; there is nothing to hold where none came onto the grid."""
    if found is None:
        return ()
    where = {"rounding_steps": found.furthest, "rounding_bias": found.most_biased}
    return checks_of(found, gates, where)
