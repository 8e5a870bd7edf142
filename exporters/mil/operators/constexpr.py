"""MIL's constexpr operators: compressed weights, decompressed when they are used.

Pages: ``iOS16.constexpr_ops`` and ``iOS18.compression``. A value is computed in float32 and rounded to the type of the
result once.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import accumulate

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.blob import BY_NAME, Packed, size_of
from slm_export.exporters.mil.operators.constant import Constant, Stored
from slm_export.exporters.mil.operators.registry import axis_of, ints, operator, wide


class ShiftScale(Constant):
    """``scale * (data - offset)``, one scale and offset per block of data."""

    def __init__(self, data: Constant, scale: Tensor, offset: Tensor | None) -> None:
        super().__init__(data.shape, scale.dtype)
        blocks = tuple(scale.shape)
        if not data.shape or len(blocks) != len(data.shape):
            raise InputError(f"scales {list(blocks)} for data {list(data.shape)}: of another rank")
        if any(size == 0 or data.shape[i] % size for i, size in enumerate(blocks)):
            raise InputError(f"scales {list(blocks)} do not divide data {list(data.shape)}")
        if offset is not None and offset.shape != scale.shape:
            raise InputError(f"offsets {list(offset.shape)} beside scales {list(blocks)}")
        self._data, self._scale, self._offset = data, wide(scale), None if offset is None else offset.float()
        self._height = data.shape[0] // blocks[0]

    def rows(self, begin: int, end: int) -> Tensor:
        """Return dequantized rows."""
        return self._dequantized(self._data.rows(begin, end), torch.arange(begin, end))

    def take(self, index: Tensor) -> Tensor:
        """Return dequantized rows."""
        return self._dequantized(self._data.take(index), index)

    def _dequantized(self, data: Tensor, index: Tensor) -> Tensor:
        # (rows, blocks, size of a block, ...): a block's scale meets its values by broadcasting.
        shape = [len(index), 1]
        for size, blocks in zip(data.shape[1:], self._scale.shape[1:], strict=True):
            shape += [blocks, size // blocks]
        result = data.to(torch.float32, copy=True).view(shape)
        if self._offset is not None:
            result -= self._per_block(self._offset, index)
        result *= self._per_block(self._scale, index)
        return result.view(data.shape).to(self.dtype)

    def _per_block(self, values: Tensor, index: Tensor) -> Tensor:
        rows = values[index // self._height]
        return rows.reshape(len(index), 1, *(size for blocks in values.shape[1:] for size in (blocks, 1)))


class LookUp(Constant):
    """A table entry, a value or a vector of values, per index; one table per group of indices."""

    def __init__(self, indices: Constant, lut: Tensor, axis: int | None) -> None:
        *groups, self._entries, self._vector = lut.shape
        shape = list(indices.shape)
        if (
            not shape
            or len(groups) != len(shape)
            or any(not g or n % g for g, n in zip(groups, shape, strict=True))
        ):
            raise InputError(f"a table {list(lut.shape)} for indices {shape}")
        if axis is None and self._vector != 1:
            raise InputError(f"vectors of {self._vector} values, and no vector_axis")
        self._axis = 0 if axis is None else axis
        self._indices, self._table, self._groups = indices, lut.reshape(-1, self._vector), groups
        shape[self._axis] *= self._vector
        super().__init__(tuple(shape), lut.dtype)

    def rows(self, begin: int, end: int) -> Tensor:
        """Return looked-up rows."""
        repeat = self._vector if self._axis == 0 else 1
        first, last = begin // repeat, -(-end // repeat)
        made = self._look_up(self._indices.rows(first, last), torch.arange(first, last))
        return made[begin - first * repeat : end - first * repeat]

    def take(self, index: Tensor) -> Tensor:
        """Return looked-up rows."""
        if self._axis or self._vector == 1:
            return self._look_up(self._indices.take(index), index)
        made = self._look_up(self._indices.take(index // self._vector), index // self._vector)
        return made[torch.arange(len(index)) * self._vector + index % self._vector]

    def _look_up(self, indices: Tensor, rows: Tensor) -> Tensor:
        number = rows // (self._indices.shape[0] // self._groups[0])
        table = number.view(-1, *[1] * (indices.dim() - 1))
        for dim in range(1, indices.dim()):
            along = torch.arange(indices.shape[dim]) // (self._indices.shape[dim] // self._groups[dim])
            table = table * self._groups[dim] + along.view(-1, *[1] * (indices.dim() - 1 - dim))
        entries = indices.to(torch.int64)
        if entries.numel() and int(entries.max()) >= self._entries:
            raise InputError(f"index {int(entries.max())} in a table of {self._entries}")
        found = self._table[table * self._entries + entries]
        return found.movedim(-1, self._axis + 1).flatten(self._axis, self._axis + 1)


class Sparse(Constant):
    """The values where a mask has a one, 0 elsewhere."""

    def __init__(self, values: Constant, mask: Constant) -> None:
        super().__init__(mask.shape, values.dtype)
        self._values, self._mask = values, mask
        counts = [int(mask.rows(row, row + 1).sum()) for row in range(mask.shape[0])]
        self._starts = [0, *accumulate(counts)]
        if values.shape != (self._starts[-1],):
            raise InputError(f"{list(values.shape)} values for a mask of {self._starts[-1]} ones")

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows with their zeros."""
        result = torch.zeros(end - begin, *self.shape[1:], dtype=self.dtype)
        result[self._mask.rows(begin, end).bool()] = self._values.rows(self._starts[begin], self._starts[end])
        return result

    def take(self, index: Tensor) -> Tensor:
        """Return rows with their zeros."""
        rows = [self.rows(row, row + 1) for row in index.tolist()]
        return torch.cat(rows) if rows else self.rows(0, 0)


class Nonzero(Constant):
    """What a matrix has where a mask has a one, in the order of rows."""

    def __init__(self, matrix: Constant, mask: Constant) -> None:
        self._matrix, self._mask = matrix, mask
        counts = [int(mask.rows(row, row + 1).sum()) for row in range(mask.shape[0])]
        self._starts = [0, *accumulate(counts)]
        super().__init__((self._starts[-1],), matrix.dtype)

    def rows(self, begin: int, end: int) -> Tensor:
        """Return values [begin, end); the rows of the matrix that they are in are made whole."""
        first, last = bisect_right(self._starts, begin) - 1, bisect_left(self._starts, end)
        first = min(first, last)
        found = self._matrix.rows(first, last)[self._mask.rows(first, last).bool()]
        return found[begin - self._starts[first] : end - self._starts[first]]

    def take(self, index: Tensor) -> Tensor:
        """Return single values."""
        return self.tensor()[index]


class Cast(Constant):
    """A constant in another type."""

    def __init__(self, source: Constant, dtype: torch.dtype) -> None:
        super().__init__(source.shape, dtype)
        self._source = source

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows in the other type."""
        return self._source.rows(begin, end).to(self.dtype)

    def take(self, index: Tensor) -> Tensor:
        """Return rows in the other type."""
        return self._source.take(index).to(self.dtype)

    def tensor(self) -> Tensor:
        """Return all of it; a scalar has no rows."""
        return self._source.tensor().to(self.dtype)


def _repacked(bytes: Constant, element: str, shape: Constant) -> Stored:
    """Return packed bytes of iOS 16, which have no shape of their own, as a constant of packed elements."""
    sizes, type = tuple(ints(shape.tensor())), BY_NAME[element]
    packed = bytes.tensor()
    if packed.dtype != torch.uint8 or not sizes or tuple(packed.shape) != (size_of(type, sizes)[0],):
        raise InputError(f"{packed.dtype} {list(packed.shape)} is not a packed {element} {list(sizes)}")
    return Stored(Packed(type, sizes, packed))


@operator("constexpr_affine_dequantize", since=16, constant=True)
def constexpr_affine_dequantize(
    quantized_data: Constant, zero_point: Constant, scale: Constant, axis: Constant
) -> Constant:
    """``scale * (quantized_data - zero_point)``, scalars or one per index of axis: iOS16.constexpr_ops."""
    rank = len(quantized_data.shape)
    position = axis_of(axis.tensor(), rank)

    def spread(values: Tensor, shape: list[int]) -> Tensor:
        if values.dim() > 1 or (values.dim() and values.numel() not in (1, quantized_data.shape[position])):
            raise InputError(
                f"{list(values.shape)} values along axis {position} of {list(quantized_data.shape)}"
            )
        return values.reshape([-1 if dim == position else 1 for dim in range(rank)]).expand(shape)

    blocks = [1] * rank
    blocks[position] = max(math.prod(scale.shape), math.prod(zero_point.shape))
    return ShiftScale(
        quantized_data, spread(scale.tensor(), blocks), spread(zero_point.tensor(), blocks).float()
    )


@operator("constexpr_blockwise_shift_scale", since=18, constant=True)
def constexpr_blockwise_shift_scale(
    data: Constant, scale: Constant, offset: Constant | None = None
) -> Constant:
    """``scale * (data - offset)``, one scale per block of data: iOS18.compression."""
    if offset is not None and not offset.dtype.is_floating_point and _element(offset) != _element(data):
        raise InputError(f"{_element(offset)} offsets for {_element(data)} data")
    return ShiftScale(data, scale.tensor(), None if offset is None else offset.tensor())


def _element(constant: Constant) -> str:
    return constant.packed.element.name if isinstance(constant, Stored) else str(constant.dtype)


@operator("constexpr_lut_to_dense", since=16, constant=True)
def constexpr_lut_to_dense_16(indices: Constant, lut: Constant, shape: Constant) -> Constant:
    """One table for all values, its indices packed in bytes, lowest bits first: iOS16.constexpr_ops."""
    entries = lut.shape[0] if len(lut.shape) == 1 else 0
    if entries not in (2, 4, 16, 64, 256):
        raise InputError(f"a table {list(lut.shape)}; it may have 2, 4, 16, 64 or 256 entries")
    packed = _repacked(indices, f"uint{int(math.log2(entries))}", shape)
    return LookUp(packed, lut.tensor().view(*[1] * len(packed.shape), entries, 1), None)


@operator("constexpr_lut_to_dense", since=18, constant=True)
def constexpr_lut_to_dense(indices: Constant, lut: Constant, vector_axis: Constant | None = None) -> Constant:
    """A table per group of indices, its entries values or vectors along vector_axis: iOS18.compression."""
    bits = indices.packed.element.bits if isinstance(indices, Stored) else 8
    if len(lut.shape) != len(indices.shape) + 2 or lut.shape[-2] != 1 << bits:
        raise InputError(f"a table {list(lut.shape)} for indices {list(indices.shape)} of {bits} bits")
    axis = None if vector_axis is None else axis_of(vector_axis.tensor(), len(indices.shape))
    return LookUp(indices, lut.tensor(), axis)


@operator("constexpr_sparse_to_dense", since=16, constant=True)
def constexpr_sparse_to_dense_16(nonzero_data: Constant, mask: Constant, shape: Constant) -> Constant:
    """The values where a bit of the mask is set, bits packed in bytes, lowest first: iOS16.constexpr_ops."""
    return Sparse(nonzero_data, _repacked(mask, "uint1", shape))


@operator("constexpr_sparse_to_dense", since=18, constant=True)
def constexpr_sparse_to_dense(nonzero_data: Constant, mask: Constant) -> Constant:
    """The values where the uint1 mask is 1: iOS18.compression."""
    return Sparse(nonzero_data, mask)


@operator("constexpr_sparse_blockwise_shift_scale", since=18, constant=True)
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Constant, nonzero_data: Constant, scale: Constant, offset: Constant | None = None
) -> tuple[Constant, Constant]:
    """The mask, and ``scale * (nonzero_data - offset)`` with the scale and offset of the block that each value is in:
    iOS18.compression.
    """
    data = Sparse(nonzero_data, data_mask)
    dense = ShiftScale(data, scale.tensor(), None if offset is None else offset.tensor())
    return data_mask, Nonzero(dense, data_mask)


@operator("constexpr_cast", since=16, constant=True)
def constexpr_cast(source_val: Constant, output_dtype: str) -> Constant:
    """``source_val`` (fp16) as fp32: iOS16.constexpr_ops."""
    if source_val.dtype != torch.float16 or output_dtype != "fp32":
        raise InputError(f"casts fp16 to fp32 only, not {source_val.dtype} to {output_dtype}")
    return Cast(source_val, torch.float32)
