"""Replace matrices by indices into small tables of their own values, as Core ML decompresses them on the Neural Engine.

Given   Dense matrices: linear layers (out, in), embedding tables and heads (vocabulary, in)
Result  4 or 6 bits: indices, and a float16 table of 16 or 64 values for each ``group_channels`` rows; 8, 16 and 32
        bits (embeddings, heads, position tables): as group-quantize makes them

The tables are found by k-means over the values of their rows (Han, Mao and Dally, Deep Compression, ICLR 2016,
section 3; https://apple.github.io/coremltools/docs-guides/source/opt-palettization-overview.html). Values lie on a
line: once they are sorted, a step of Lloyd's algorithm is a binary search for each border and a difference of running
sums. It begins where a good table ends: the best density of entries is the cube root of that of the values (Panter and
Dite, Quantization distortion in pulse-count modulation with nonuniform spacing of levels, 1951).

Sums are float64 in a fixed order, and nothing but +, -, *, / and square roots is used: the same values give the same
bits on every machine, whatever the number of threads. No data is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_export.bundles.finished import Keeper
from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.weights import TABLE_BITS, Dense, Palettized, pack_indices

_STEPS = 50
"""Most steps of Lloyd's algorithm; some 20 are enough for most tables."""
_CELLS = 8
"""Cells of equal count, per entry of a table, that the density of values is told by."""
_BLOCK = 1 << 18  # values at a time: their float64 copies stay in the processor's cache


@dataclass(frozen=True)
class Palettize:
    """Options: bits of linear layers, rows that share a table, bits of embedding and head."""

    name: ClassVar[str] = "palettize"
    calibrated: ClassVar[bool] = False
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = False

    bits: Literal[4, 6] = 4
    group_channels: int = 16
    """Rows (output channels) that share a table, at most: the largest number up to it that divides a matrix's rows.
    0: one table for the matrix, all that iOS 17 knows."""
    embedding_bits: Literal[4, 6, 8, 16, 32] = 8
    head_bits: Literal[4, 6, 8, 16, 32] | None = None
    """None: as the embedding. A tied pair is one matrix, and takes ``embedding_bits``."""

    def __post_init__(self) -> None:
        if self.bits not in TABLE_BITS:
            raise InputError(f"palettize: bits must be 4 or 6, not {self.bits!r}")
        for option in ("embedding_bits", "head_bits"):
            if (value := getattr(self, option)) not in (*TABLE_BITS, 8, 16, 32) and value is not None:
                raise InputError(f"palettize: {option} must be 4, 6, 8, 16 or 32, not {value!r}")
        if self.group_channels < 0:
            raise InputError(
                f"palettize: group_channels must be a number of rows, or 0 for all, not {self.group_channels}"
            )

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what cannot mean what the user asked for."""
        if checkpoint.tied and self.head_bits not in (None, self.embedding_bits):
            raise InputError(
                f"palettize: head bits {self.head_bits} and embedding bits {self.embedding_bits} differ, but this "
                "model ties its head to its embedding: they are one matrix; give both the same bits, or leave out the "
                "head's"
            )

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Palettize every matrix that tables are asked for, one at a time; what is left goes to group-quantize."""
        self.check(checkpoint)
        made: dict[str, Palettized] = {}
        notes = []
        for name, weight in checkpoint.weights.items():
            bits = self._bits_of(checkpoint.roles.get(name, "other"))
            if bits not in TABLE_BITS or not isinstance(weight, Dense):
                continue
            palettized = self._convert(name, weight, bits, work.keeper)
            if isinstance(palettized, str):
                notes.append(f"{name} is stored in 8 bits with a scale per row, not in tables: {palettized}")
            else:
                made[name] = palettized
        head = self.head_bits or self.embedding_bits
        rest = GroupQuantize(8, embedding_bits=_whole(self.embedding_bits), head_bits=_whole(head))
        result = rest.run(checkpoint.with_weights(made), work)
        skipped = {name: reason for name, reason in result.skipped.items() if name not in made}
        return PassResult(result.checkpoint, skipped, tuple(notes))

    def _convert(self, name: str, weight: Dense, bits: int, keeper: Keeper) -> Palettized | str:
        group = _group(weight.shape[0], self.group_channels)
        if reason := _unfit(weight, bits, group):
            return reason
        return keeper.keep(name, lambda: palettize(weight.load(), bits, group))

    def _bits_of(self, role: str) -> int:
        # Position tables are small and every token reads one: they are left to group-quantize.
        return {
            "linear": self.bits,
            "embedding": self.embedding_bits,
            "head": self.head_bits or self.embedding_bits,
        }.get(role, 0)


def palettize(values: Tensor, bits: int, group: int) -> Palettized:
    """Return floats (out, in), none beyond float16's range, as indices into a table for each ``group`` rows.

    Blocks of whole groups are worked on, so that the search needs little memory beside the result.
    """
    rows, columns = values.shape
    blocks = []
    for block in torch.split(values, group * max(1, _BLOCK // (group * columns))):
        groups = block.float().reshape(-1, group * columns)
        tables = _tables(groups, 1 << bits)
        indices = _nearest(groups, tables).to(torch.uint8)
        blocks.append((pack_indices(indices.view(-1, columns), bits), tables))
    packed, found = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Palettized.of((rows, columns), bits, packed, found)


def _tables(groups: Tensor, entries: int) -> Tensor:
    """Return float16 (groups, entries), ascending, of float32 values (groups, n)."""
    ordered = groups.sort(dim=1).values.double()
    sums = F.pad(ordered.cumsum(1), (1, 0))
    centres = _start(ordered, entries)
    for _ in range(_STEPS):
        better = _step(ordered, sums, centres)
        if torch.equal(better, centres):
            break
        centres = better
    tables = centres.float()
    # What was pruned stays pruned: where there are zeros, the entry nearest to 0 is 0.
    smallest = torch.arange(entries) == tables.abs().argmin(1, keepdim=True)
    zeros = (groups == 0).any(1, keepdim=True)
    return tables.masked_fill_(smallest & zeros, 0).half()


def _start(ordered: Tensor, entries: int) -> Tensor:
    """Return centres (groups, entries), as dense as the cube root of the density of values (groups, n)."""
    last = ordered.shape[1] - 1
    cells = max(1, min(last, _CELLS * entries))
    edges = ordered[:, torch.arange(cells + 1) * last // cells]
    # Cells hold equally many values: a cell of width d has the density 1/d, and wants a share d * (1/d)^(1/3) of the
    # entries. d^(5/8) is near enough, and made of square roots: a machine's powers differ in the last bit.
    widths = edges.diff(dim=1)
    shares = F.pad((widths * widths.sqrt().sqrt()).sqrt().cumsum(1), (1, 0))
    wanted = shares[:, -1:] * ((torch.arange(entries).double() + 0.5) / entries)
    cell = torch.searchsorted(shares, wanted, right=True).clamp_(1, cells) - 1
    below, above = shares.gather(1, cell), shares.gather(1, cell + 1)
    within = torch.where(above > below, (wanted - below) / (above - below), 0)
    return edges.gather(1, cell) + within * widths.gather(1, cell)


def _step(ordered: Tensor, sums: Tensor, centres: Tensor) -> Tensor:
    """Return the mean of the values nearest to each centre; a centre that none is nearest to stays."""
    inner = torch.searchsorted(ordered, (centres[:, 1:] + centres[:, :-1]) / 2)
    borders = F.pad(F.pad(inner, (1, 0)), (0, 1), value=ordered.shape[1])
    counts = borders.diff(dim=1)
    means = sums.gather(1, borders).diff(dim=1) / counts.clamp_min(1)
    return torch.where(counts > 0, means, centres)


def _nearest(groups: Tensor, tables: Tensor) -> Tensor:
    """Return the index of the nearest entry for float32 values (groups, n), int64; of two, the lower."""
    entries = tables.double()
    return torch.searchsorted((entries[:, 1:] + entries[:, :-1]) / 2, groups.double())


def _group(rows: int, most: int) -> int:
    """Return how many rows share a table: the largest divisor of all up to ``most``."""
    if not most:
        return rows
    return next(group for group in range(min(most, rows), 0, -1) if rows % group == 0)


def _unfit(weight: Dense, bits: int, group: int) -> str | None:
    """Return why a matrix is better not in tables."""
    rows, columns = weight.shape
    if columns * bits % 8:
        return f"rows of {columns} indices of {bits} bits do not end with a byte"
    if weight.count * bits // 8 + 2 * (rows // group << bits) >= weight.count:
        return f"{rows // group} tables for {rows} rows of {columns} values would take more than they save"
    if (largest := weight.load().abs().max().item()) > torch.finfo(torch.float16).max:
        return f"it holds {largest:.3g}, beyond the range of float16"
    return None


def _whole(bits: int) -> Literal[8, 16, 32]:
    """Return the bits for what tables do not fit."""
    return 8 if bits in TABLE_BITS else bits  # type: ignore[return-value]
