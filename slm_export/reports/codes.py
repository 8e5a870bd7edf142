"""Which integers of two bundles differ, matrix by matrix, as their own files hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slm_export.parity import Stored
from slm_export.reports.by_weight import layer_of
from slm_export.weights import Coded, Palettized, unpack, unpack_indices

_BYTES = 1 << 22  # of packed codes that are unpacked together

Kind = Literal["same", "codes", "scales", "grid", "added", "removed"]


@dataclass(frozen=True)
class MatrixChange:
    """One matrix in two bundles."""

    name: str
    kind: Kind
    """codes: some differ. scales: only scales or tables do. grid: other bits, groups or shape. added, removed."""
    values: int
    """How many codes it has, in the bundle that has it."""
    changed: int
    """How many differ; all of them on another grid, or where one side lacks the matrix."""
    detail: str = ""


@dataclass(frozen=True)
class BlockChange:
    """The matrices of one block, or one that is in none."""

    block: str
    matrices: int
    changed_matrices: int
    values: int
    changed: int
    what: str
    """Kinds of changes, with how many matrices each."""

    @property
    def share(self) -> float:
        """The share of codes that differ."""
        return self.changed / self.values if self.values else 0.0


def changes(old: Stored, new: Stored) -> tuple[MatrixChange, ...]:
    """Return a row for every matrix that either side has, in the old side's order."""
    return tuple(_change(name, old.get(name), new.get(name)) for name in dict.fromkeys((*old, *new)))


def by_block(rows: Sequence[MatrixChange]) -> tuple[BlockChange, ...]:
    """Return the changes block by block, what is outside blocks under its own name."""
    groups: dict[str, list[MatrixChange]] = {}
    for row in rows:
        layer, part = layer_of(row.name)
        groups.setdefault(part if layer is None else f"layer {layer}", []).append(row)
    return tuple(
        BlockChange(
            block,
            len(group),
            sum(row.kind != "same" for row in group),
            sum(row.values for row in group),
            sum(row.changed for row in group),
            _kinds(group),
        )
        for block, group in groups.items()
    )


def share_changed(rows: Iterable[MatrixChange]) -> float:
    """Return the share of all codes that differ."""
    rows = tuple(rows)
    values = sum(row.values for row in rows)
    return sum(row.changed for row in rows) / values if values else 0.0


def _kinds(group: Sequence[MatrixChange]) -> str:
    counts: dict[str, int] = {}
    for row in group:
        if row.kind != "same":
            text = row.kind + (f" ({row.detail})" if row.detail else "")
            counts[text] = counts.get(text, 0) + 1
    return ", ".join(f"{count} {text}" for text, count in counts.items())


def _change(name: str, old: Coded | None, new: Coded | None) -> MatrixChange:
    if old is None or new is None:
        there = old if new is None else new
        assert there is not None
        return MatrixChange(name, "removed" if new is None else "added", there.count, there.count)
    if _grid(old) != _grid(new):
        return MatrixChange(name, "grid", new.count, new.count, f"{_grid(old)} -> {_grid(new)}")
    codes, meaning = old.load()
    new_codes, new_meaning = new.load()
    changed = 0
    if not torch.equal(codes, new_codes):
        pairs = zip(_unpacked(old, codes), _unpacked(new, new_codes), strict=True)
        changed = sum(int((a != b).sum()) for a, b in pairs)
    if changed:
        return MatrixChange(name, "codes", new.count, changed)
    return MatrixChange(name, "same" if torch.equal(meaning, new_meaning) else "scales", new.count, 0)


def _grid(weight: Coded) -> str:
    rows, columns = weight.shape
    kind = "tables of" if isinstance(weight, Palettized) else "groups of"
    return f"{rows}x{columns} in {weight.bits} bits, {kind} {weight.group}"


def _unpacked(weight: Coded, packed: Tensor) -> Iterator[Tensor]:
    """Yield the codes of some rows at a time."""
    rows = max(1, _BYTES // max(1, packed.shape[1]))
    for block in torch.split(packed, rows):
        yield (
            unpack_indices(block, weight.bits)
            if isinstance(weight, Palettized)
            else unpack(block, weight.bits)
        )
