"""Weights, and the one integer grid that every format shares.

    Dense       a matrix, vector or table of floats, read when asked for
    Quantized   signed integer codes with one scale per group of columns
    Palettized  indices into tables of float16 values, one table per group of rows; Core ML alone has them

The grid, which every back end can represent bit for bit:

    int4   symmetric, codes -8..7, zero point 0, groups of 32, 64, 128 or 256 along the input dimension
    int8   symmetric, codes -127..127, one scale per output channel (row)
    scale  a bfloat16 value of at least 2^-17, so exact in bfloat16, float16 and float32, and never 0:
           an all-zero group (a pad token's row, a pruned neuron) still has a valid scale
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

GROUPS = (32, 64, 128, 256)
SMALLEST_SCALE = 2.0**-17
CODE_RANGE = {4: (-8, 7), 8: (-127, 127)}
TABLE_BITS = (4, 6)
"""Bits of an index into a table of 2^bits values."""


@dataclass(frozen=True)
class Dense:
    """Floats that stay on disk until ``load`` is called; nothing here keeps what it returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Returns the tensor, of this shape and dtype, read-only by agreement."""

    @property
    def bytes(self) -> int:
        """Size in storage."""
        return self.count * self.dtype.itemsize

    @property
    def count(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    def float32(self) -> Tensor:
        """Return the values as float32."""
        return self.load().to(torch.float32)

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows as float32 (rows, in)."""
        return self.load()[index].to(torch.float32)


@dataclass(frozen=True)
class Quantized:
    """A matrix on the integer grid: value = code * scale of its group."""

    shape: tuple[int, int]
    bits: int
    group: int
    """Columns that share a scale; all of them at 8 bits."""
    load: Callable[[], tuple[Tensor, Tensor]]
    """Returns codes and scales, as `packed` and `scales` are; from memory or from disk."""

    @staticmethod
    def of(shape: tuple[int, int], bits: int, packed: Tensor, scales: Tensor) -> Quantized:
        """Return a matrix that is in memory."""
        rows, columns = shape
        assert bits in CODE_RANGE
        assert packed.shape == (rows, columns * bits // 8), packed.shape
        assert scales.shape[0] == rows, scales.shape
        assert columns % scales.shape[1] == 0, scales.shape
        return Quantized(shape, bits, columns // scales.shape[1], lambda: (packed, scales))

    @property
    def packed(self) -> Tensor:
        """int8: the codes, int8 (out, in). int4: two per byte, uint8 (out, in / 2), even column in the low nibble."""
        return self.load()[0]

    @property
    def scales(self) -> Tensor:
        """float32 (out, groups), each a bfloat16 value of at least 2^-17."""
        return self.load()[1]

    @property
    def bytes(self) -> int:
        """Size in storage: the codes, and two bytes per scale."""
        return self.count * self.bits // 8 + 2 * (self.count // self.group)

    @property
    def count(self) -> int:
        """Number of values."""
        return self.shape[0] * self.shape[1]

    def codes(self) -> Tensor:
        """Return the codes, int8 (out, in)."""
        return unpack(self.packed, self.bits)

    def float32(self) -> Tensor:
        """Return code * scale, float32 (out, in)."""
        packed, scales = self.load()
        codes = _float_codes(packed, self.bits).view(*scales.shape, self.group)
        return codes.mul_(scales.unsqueeze(-1)).view(self.shape)

    def rows(self, index: Tensor | slice) -> Tensor:
        """Return some rows as float32 (rows, in)."""
        packed, scales = (part[index] for part in self.load())
        return Quantized.of((packed.shape[0], self.shape[1]), self.bits, packed, scales).float32()


@dataclass(frozen=True)
class Palettized:
    """A matrix of indices: value = table of its group of rows, at the index.

    Source: ``constexpr_lut_to_dense`` of iOS 18, https://apple.github.io/coremltools/source (iOS18.compression).
    """

    shape: tuple[int, int]
    bits: int
    """Of an index: one of `TABLE_BITS`."""
    group: int
    """Rows (output channels) that share a table."""
    load: Callable[[], tuple[Tensor, Tensor]]
    """Returns indices and tables, as `packed` and `tables` are; from memory or from disk."""

    @staticmethod
    def of(shape: tuple[int, int], bits: int, packed: Tensor, tables: Tensor) -> Palettized:
        """Return a matrix that is in memory."""
        rows, columns = shape
        assert bits in TABLE_BITS
        assert packed.shape == (rows, columns * bits // 8), packed.shape
        assert tables.dtype == torch.float16
        assert tables.shape[1] == 1 << bits, tables.shape
        assert rows % tables.shape[0] == 0, tables.shape
        return Palettized(shape, bits, rows // tables.shape[0], lambda: (packed, tables))

    @property
    def packed(self) -> Tensor:
        """uint8 (out, in * bits / 8): the indices of a row one after the other, the first in the lowest bits."""
        return self.load()[0]

    @property
    def tables(self) -> Tensor:
        """float16 (out / group, 2^bits), each in ascending order."""
        return self.load()[1]

    @property
    def bytes(self) -> int:
        """Size in storage: the indices, and two bytes per entry of a table."""
        return self.count * self.bits // 8 + 2 * (self.shape[0] // self.group << self.bits)

    @property
    def count(self) -> int:
        """Number of values."""
        return self.shape[0] * self.shape[1]

    def indices(self) -> Tensor:
        """Return the indices, uint8 (out, in)."""
        return unpack_indices(self.packed, self.bits)

    def float32(self) -> Tensor:
        """Return the values that the indices name, float32 (out, in)."""
        return self.rows(slice(None))

    def rows(self, index: Tensor | slice) -> Tensor:
        """Return some rows as float32 (rows, in)."""
        packed, tables = self.load()
        table = torch.arange(self.shape[0])[index] // self.group
        indices = unpack_indices(packed[index], self.bits).to(torch.int64)
        return tables.to(torch.float32)[table].gather(1, indices)


Coded = Quantized | Palettized
"""Stored in fewer bits than a float: codes, and what they mean."""
Weight = Dense | Quantized | Palettized


def on_grid(weight: Weight) -> Dense | Quantized:
    """Return the weight, for a format that has no tables; a plan that would bring it one was refused."""
    assert not isinstance(weight, Palettized)
    return weight


def float_blocks(weight: Weight, values: int) -> Iterator[Tensor]:
    """Yield a weight as float32 blocks of whole rows, of about so many values, made as they are used."""
    rows = max(1, values // (weight.count // weight.shape[0]))
    if isinstance(weight, Dense):
        yield from (block.to(torch.float32) for block in torch.split(weight.load(), rows))
    else:
        yield from (weight.rows(slice(i, i + rows)) for i in range(0, weight.shape[0], rows))


def grid_scale(scale: Tensor) -> Tensor:
    """Return the nearest scales on the grid, float32."""
    return scale.to(torch.bfloat16).to(torch.float32).clamp_min(SMALLEST_SCALE)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes -8..7, int8 (out, in), into uint8 (out, in / 2), even column in the low nibble."""
    nibbles = (codes & 0xF).view(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return codes, int8 (out, in), of codes as they are stored."""
    return packed if bits == 8 else unpack_int4(packed)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`: int8 (out, in)."""
    # An arithmetic shift of the signed byte extends the sign of the high nibble.
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(1)


def _float_codes(packed: Tensor, bits: int) -> Tensor:
    """Return codes as `unpack` does, but float32 in memory of their own."""
    if bits == 8:
        return packed.to(torch.float32)
    # Two values at a time out of a table: several times as fast as shifting, stacking and converting.
    pairs = _pairs_of_nibbles().index_select(0, packed.flatten().to(torch.int32))
    return pairs.view(torch.float32).view(packed.shape[0], 2 * packed.shape[1])


@lru_cache(maxsize=1)
def _pairs_of_nibbles() -> Tensor:
    """Return the two codes of every byte as float32 (256, 2), each pair seen as one int64: (256,)."""
    packed = torch.arange(256, dtype=torch.uint8).view(256, 1)
    return unpack_int4(packed).to(torch.float32).view(torch.int64).flatten()


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Pack indices below 2^bits, uint8 (out, in), into uint8 (out, in * bits / 8), the first in the lowest bits."""
    if bits == 4:
        return indices[:, 0::2] | (indices[:, 1::2] << 4)
    a, b, c, d = (indices[:, start::4] for start in range(4))
    return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), dim=-1).flatten(1)


def unpack_indices(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack_indices`: uint8 (out, in)."""
    if bits == 4:
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
    a, b, c = (packed[:, start::3] for start in range(3))
    parts = (a & 0x3F, (a >> 6) | ((b & 0xF) << 2), (b >> 4) | ((c & 0x3) << 4), c >> 2)
    return torch.stack(parts, dim=-1).flatten(1)


def quantized(codes: Tensor, scales: Tensor, bits: int) -> Quantized:
    """Return codes int8 (out, in) and grid scales float32 (out, groups) as a weight."""
    shape = (codes.shape[0], codes.shape[1])
    return Quantized.of(shape, bits, codes if bits == 8 else pack_int4(codes), scales)
