"""What became of every weight: how far it is from what it was, and what it takes.

relative_errors  what one pass did to the values
rows_of          a row for every weight of a finished checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.reports.details import WeightRow
from slm_export.weights import Dense, Weight, float_blocks

_BLOCK = 1 << 18  # values, which stay in the processor's cache
_IN_BLOCK = re.compile(r".+?\.(?P<layer>\d+)\.(?P<part>.+)")


def relative_errors(before: Checkpoint, after: Checkpoint) -> tuple[float | None, dict[str, float]]:
    """Return sum |w - w'|^2 / sum |w|^2 over the weights that differ (None if none does), and of each by itself.

    One of another shape than before, or of zeros, has no relative error.
    """
    errors: dict[str, float] = {}
    total = total_norm = 0.0
    for name, weight in before.weights.items():
        changed = after.weights.get(name)
        if changed is None or changed is weight or changed.shape != weight.shape:
            continue
        error, norm = _squares(weight, changed)
        total, total_norm = total + error, total_norm + norm
        if norm:
            errors[name] = error / norm
    return total / total_norm if total_norm else None, errors


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


def _squares(weight: Weight, changed: Weight) -> tuple[float, float]:
    """Return |w - w'|^2 and |w|^2."""
    error = norm = 0.0
    for old, new in zip(*(float_blocks(side, _BLOCK) for side in (weight, changed)), strict=True):
        norm += _square(old)
        error += _square(new - old)
    return error, norm


def _square(x: Tensor) -> float:
    # One pass over the values, where a product and a sum are two.
    return torch.dot(x.flatten(), x.flatten()).item()
