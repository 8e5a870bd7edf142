"""How each format stores what is on the grid, in bytes: of a matrix, and of the program around the weights.

Sizes are those of artifacts of this project. Memory was measured on the host with a 1B model (docs/plan.md); of Core
ML, which cannot be run there, it is a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Format:
    """How a format stores what is on the grid, in bytes."""

    group_scale: int
    """A scale of a group of int4 columns."""
    row_scale: int
    """What a row of an int8 layer has beside its codes: scale, and zero point or sum of the row."""
    table_scale: int
    """The same of a table that is looked up. A vocabulary that is tied to its head has both, at both widths."""
    vector: int
    """A value of a norm or a bias."""
    int4: int
    """What the program needs more for a matrix of int4, and for one of int8."""
    int8: int
    program: int
    """The file around the weights, and of each block."""
    block: int
    tokenizer: bool
    """Whether the file carries the tokenizer, compressed."""
    memory: float
    """Bytes of memory for a byte of the file, and for a model of no size (MiB), of the runtime on the host."""
    runtime_mb: float
    rotary: int = 0
    """Bytes of the angles of a position, for each value of a head, where the program holds them as tables."""


FORMATS: Mapping[str, Format] = {
    "executorch": Format(2, 4, 4, 4, 0, 0, 20_000, 11_000, False, 1.57, 15),
    "litert": Format(2, 12, 0, 4, 350, 0, 40_000, 21_400, True, 1.73, 30),
    "onnx": Format(4, 8, 0, 4, 0, 1_250, 10_000, 4_000, False, 2.17, 30),
    "coreml": Format(2, 2, 0, 2, 0, 0, 10_000, 45_000, False, 1.0, 0, 4),
}


def matrix_bytes(
    known: Format, shape: Sequence[int], bits: int, group: int, *, looked_up: bool, tied: bool
) -> int:
    """Return what a matrix (out, in) takes in a file of a format, the scales that it needs there included.

    Given   group: columns per scale, at 4 bits
            looked_up: whether it is a table; tied: whether it is the head too
    """
    count = prod(shape)
    if bits >= 16:
        return count * bits // 8
    if bits == 8:
        row = known.table_scale or known.row_scale if looked_up else known.row_scale
        both = known.table_scale + known.row_scale
        return count + shape[0] * (both if tied else row) + known.int8
    twice = 2 if tied and known.table_scale else 1
    return count // 2 + twice * known.group_scale * (count // group) + known.int4
