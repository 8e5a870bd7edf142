"""What a matrix may be stored in, and what that takes.

A choice is a precision of the shared grid, or float16. Of a matrix whose columns do not divide by a group there is no
such choice; position tables are never in 4 bits (see `optimizers/group_quantize.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from slm_export.checkpoint import Checkpoint, Role
from slm_export.weights import GROUPS


@dataclass(frozen=True, order=True)
class Choice:
    """Bits, and columns per scale where there are several in a row."""

    bits: int
    group: int = 0
    """0: one scale per row at 8 bits, none at 16."""

    def __str__(self) -> str:
        """Return e.g. ``int4/32``, ``int8`` or ``float16``."""
        if self.bits == 16:
            return "float16"
        return f"int{self.bits}/{self.group}" if self.group else f"int{self.bits}"

    def bytes(self, shape: Sequence[int], scale_bytes: int = 2) -> int:
        """Return what codes and scales of a matrix (out, in) take.

        Given   scale_bytes: of one scale of a row of int8, which is float32 in some formats
        """
        count = prod(shape)
        if self.bits == 16:
            return 2 * count
        if self.bits == 8:
            return count + scale_bytes * shape[0]
        return count // 2 + 2 * (count // self.group)


FLOAT16 = Choice(16)
INT8 = Choice(8)

Options = Mapping[str, tuple[Choice, ...]]
"""Of every matrix what it may be stored in."""
Allocation = Mapping[str, Choice]
"""Of every matrix what it is stored in."""


def options_for(checkpoint: Checkpoint) -> dict[str, tuple[Choice, ...]]:
    """Return the choices of every matrix that is still in floats, the largest first."""
    return {
        name: _choices(checkpoint.roles[name], weight.shape)
        for name, weight in checkpoint.weights.items()
        if checkpoint.roles.get(name, "other") != "other" and hasattr(weight, "dtype")
    }


def _choices(role: Role, shape: Sequence[int]) -> tuple[Choice, ...]:
    groups = [group for group in GROUPS if not shape[1] % group] if role != "table" else []
    return (FLOAT16, INT8, *(Choice(4, group) for group in groups))


def tables_of(allocation: Allocation) -> dict[str, dict[str, int]]:
    """Return an allocation as options of a quantizing pass (see `precision`)."""
    return {
        "bits_by_tensor": {name: choice.bits for name, choice in allocation.items()},
        "group_by_tensor": {name: choice.group for name, choice in allocation.items() if choice.bits == 4},
    }
