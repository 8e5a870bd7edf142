"""What every matrix is stored in, by a recipe: the arithmetic of the quantizing passes, without the passes.

`optimizers.group_quantize` and `palettize` decide the same from a loaded model; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from slm_export.errors import InputError
from slm_export.planning.formats import FORMATS, matrix_bytes
from slm_export.planning.model import Matrix, ModelShape, Role
from slm_export.quantization_options import PALETTIZE

QUANTIZING = frozenset({"group-quantize", "gptq", "learned-rounding"})
OTHERS = frozenset(
    {
        "awq",
        "rotate",
        "recover",
        "sparsify",
        "drop-layers",
        "prune-kv-groups",
        "prune-neurons",
        "trim-vocabulary",
    }
)
"""Passes that leave precisions as they are; what they do to shapes is in `shaping`."""
_GROUPS = (32, 64, 128, 256)
_FLOAT = 32


@dataclass(frozen=True)
class Stored:
    """A matrix as an artifact holds it."""

    matrix: Matrix
    bits: int
    group: int = 0
    """Columns per scale at 4 bits; rows per table of a palette."""
    palette: bool = False

    def bytes(self, format: str, *, tied: bool) -> int:
        """Return what it takes in a file; ``tied``: whether it is the head too."""
        if self.palette:
            return _palette_bytes(self)
        looked_up = self.matrix.role in ("embedding", "table")
        known = FORMATS[format]
        return matrix_bytes(known, self.matrix.shape, self.bits, self.group, looked_up=looked_up, tied=tied)

    @property
    def packed_bytes(self) -> float:
        """Return its bytes as kernels read it: codes, and scales of two bytes."""
        if self.palette:
            return _palette_bytes(self)
        rows, count = self.matrix.shape[0], self.matrix.count
        scales = count // self.group if self.bits == 4 else rows if self.bits == 8 else 0
        return count * self.bits / 8 + 2 * scales

    @property
    def kind(self) -> str:
        """Return the class of operator that reads it: int4, int8 or float."""
        return "float" if self.bits >= 16 else f"int{4 if self.bits == 4 else 8}"


Recipe = Sequence[tuple[str, Mapping[str, Any]]]


def store(model: ModelShape, recipe: Recipe) -> tuple[tuple[Stored, ...], tuple[str, ...]]:
    """Return every matrix as the recipe leaves it, and notes on what cannot be told.

    Raises:
        InputError: a group size that does not fit, or bits that no matrix can have.
    """
    stored = tuple(Stored(matrix, _FLOAT) for matrix in model.matrices)
    notes = []
    for name, options in recipe:
        if name in QUANTIZING:
            stored = tuple(_quantized(one, options, name) for one in stored)
        elif name == PALETTIZE:
            stored = tuple(_palettized(one, options) for one in stored)
        elif name not in OTHERS:
            notes.append(f"{name}: what it does to size and speed is not predicted")
    return stored, tuple(notes)


def _bits_of(options: Mapping[str, Any], role: Role, linear: int) -> int:
    embedding = int(options.get("embedding_bits", 8))
    if role == "linear":
        return int(options.get("bits", linear))
    if role == "head":
        return int(options.get("head_bits") or embedding)
    # Position tables are never below 8 bits.
    return max(8, embedding) if role == "table" else embedding


def _quantized(one: Stored, options: Mapping[str, Any], name: str) -> Stored:
    matrix = one.matrix
    bits = _named(options.get("bits_by_tensor", {}), matrix.name) or _bits_of(options, matrix.role, 4)
    if bits not in (4, 8, 16, 32):
        raise InputError(f"{name}: bits must be 4, 8, 16 or 32, not {bits}")
    if one.bits != _FLOAT or bits == _FLOAT:
        return one
    if bits != 4:
        return Stored(matrix, bits)
    if matrix.shape[1] % _GROUPS[0]:
        return one
    group = _named(options.get("group_by_tensor", {}), matrix.name) or int(options.get("group", 32))
    if matrix.shape[1] % group:
        fitting = " or ".join(str(g) for g in _GROUPS if not matrix.shape[1] % g)
        raise InputError(
            f"group size {group} does not divide the {matrix.shape[1]} columns of {matrix.name}; "
            f"a group size that fits: {fitting}"
        )
    return Stored(matrix, 4, group)


def _palettized(one: Stored, options: Mapping[str, Any]) -> Stored:
    matrix = one.matrix
    bits = _bits_of(options, matrix.role, 4)
    if one.bits != _FLOAT or bits == _FLOAT:
        return one
    rows, columns = matrix.shape
    most = int(options.get("group_channels", 16)) or rows
    group = next(group for group in range(min(most, rows), 0, -1) if not rows % group)
    made = Stored(matrix, bits, group, palette=True)
    # Where tables would take more than they save, 8 bits do; so do indices that fill no whole bytes.
    pays = bits < 8 and not columns * bits % 8 and _palette_bytes(made) < matrix.count
    return made if pays and matrix.role != "table" else Stored(matrix, max(8, bits))


def _palette_bytes(one: Stored) -> int:
    """Return the bytes of indices and of float16 tables."""
    return one.matrix.count * one.bits // 8 + 2 * (one.matrix.shape[0] // one.group << one.bits)


def _named(table: Mapping[str, int], name: str) -> int | None:
    """Return what a table says of a weight: its full name goes before patterns, the last pattern before others."""
    if name in table:
        return table[name]
    fitting = [value for pattern, value in table.items() if fnmatchcase(name, pattern)]
    return fitting[-1] if fitting else None


def smaller(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Return recipes that take less and less, each with the options that ask for it."""
    rest = [(name, options) for name, options in recipe if name not in QUANTIZING and name != PALETTIZE]
    ladder = (
        ("--bits 8", {"bits": 8, "embedding_bits": 8}),
        ("--bits 4 --embedding-bits 8", {"bits": 4, "group": 32, "embedding_bits": 8}),
        ("--bits 4 --embedding-bits 4", {"bits": 4, "group": 32, "embedding_bits": 4}),
        ("--bits 4 --group-size 128 --embedding-bits 4", {"bits": 4, "group": 128, "embedding_bits": 4}),
    )
    return [(words, (*rest, ("group-quantize", options))) for words, options in ladder]
