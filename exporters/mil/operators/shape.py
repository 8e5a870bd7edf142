"""MIL's operators that move elements and compute none. Pages: ``iOS15.tensor_transformation``, ``tensor_operation``,
``iOS16`` and ``iOS17.tensor_transformation``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.registry import Size, Sizes, axes_of, axis_of, bounded, ints, operator


@operator("identity", view=True)
def identity(x: Tensor) -> Tensor:
    """``x``: iOS15.tensor_operation."""
    return x


@operator("reshape", view=True)
def reshape_15(x: Tensor, shape: Sizes) -> Tensor:
    """``x`` in another shape; 0 keeps a dimension where ranks are equal, -1 is what is left: iOS15."""
    sizes = ints(shape)
    if 0 in sizes and len(sizes) != x.dim():
        raise InputError(f"a 0 in shape {sizes} for x {list(x.shape)}, of another rank")
    return _reshaped(
        x, [own if size == 0 else size for size, own in zip(sizes, _padded(x, sizes), strict=True)]
    )


@operator("reshape", since=17, view=True)
def reshape(x: Tensor, shape: Sizes) -> Tensor:
    """``x`` in another shape; 0 keeps the dimension as counted from the end (1 beyond x), -1 is what is left: iOS17."""
    sizes = ints(shape)
    return _reshaped(
        x, [own if size == 0 else size for size, own in zip(sizes, _padded(x, sizes), strict=True)]
    )


def _padded(x: Tensor, sizes: Sequence[int]) -> list[int]:
    own = list(x.shape)
    return [1] * (len(sizes) - len(own)) + own[max(0, len(own) - len(sizes)) :]


def _reshaped(x: Tensor, sizes: list[int]) -> Tensor:
    if sizes.count(-1) > 1 or any(size < -1 for size in sizes):
        raise InputError(f"a shape {sizes}")
    return x.reshape(sizes)


@operator("reshape_like", since=16, view=True)
def reshape_like(
    x: Tensor,
    ref_tensors: Sequence[Tensor],
    begins: Sequence[Tensor],
    ends: Sequence[Tensor],
    end_masks: Sequence[Tensor],
) -> Tensor:
    """``x`` in a shape put together from dimensions of other tensors: iOS16.tensor_transformation."""
    sizes: list[int] = []
    for tensor, begin, end, to_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += tensor.shape[int(begin) : None if to_end else int(end)]
    return x.reshape(sizes)


@operator("expand_dims", view=True)
def expand_dims(x: Tensor, axes: Sizes) -> Tensor:
    """``x`` with dimensions of size 1 at axes of the result: iOS15.tensor_transformation."""
    places = axes_of(axes, x.dim() + len(ints(axes)))
    if len(set(places)) != len(places):
        raise InputError(f"axes {ints(axes)}, one of them twice")
    for place in sorted(places):
        x = x.unsqueeze(place)
    return x


@operator("squeeze", view=True)
def squeeze(x: Tensor, axes: Sizes | None = None) -> Tensor:
    """``x`` without those of its dimensions (or of axes) that have size 1: iOS15.tensor_transformation."""
    return x.squeeze() if axes is None else x.squeeze(axes_of(axes, x.dim()))


@operator("flatten2d", view=True)
def flatten2d(x: Tensor, axis: Size = 1) -> Tensor:
    """``x`` as a matrix, dimensions before axis by those from it: iOS15.tensor_operation."""
    place = int(axis) + (x.dim() if int(axis) < 0 else 0)
    if not 0 <= place <= x.dim():
        raise InputError(f"axis {int(axis)} of a tensor of rank {x.dim()}")
    return x.reshape(math.prod(x.shape[:place]), math.prod(x.shape[place:]))


@operator("transpose", view=True)
def transpose(x: Tensor, perm: Sizes) -> Tensor:
    """``x`` with its dimensions in the order perm: iOS15.tensor_transformation."""
    return x.permute(axes_of(perm, x.dim()))


@operator("reverse")
def reverse(x: Tensor, axes: Sizes | None = None) -> Tensor:
    """``x`` backwards along axes, or along all: iOS15.tensor_transformation."""
    return x.flip(axes_of(axes, x.dim()))


@operator("concat")
def concat(values: Sequence[Tensor], axis: Size, interleave: Size = False) -> Tensor:
    """Tensors one after the other along axis, or element by element in turn: iOS15.tensor_operation.

    Scalars count as vectors of one element; the page leaves that out, but every shape that is computed is put
    together so.
    """
    _same_types(values)
    if not values[0].dim():
        return torch.stack(list(values))
    dim = axis_of(axis, values[0].dim())
    if not interleave:
        return torch.cat(list(values), dim)
    return torch.stack(list(values), dim + 1).flatten(dim, dim + 1)


@operator("stack")
def stack(values: Sequence[Tensor], axis: Size) -> Tensor:
    """Tensors of one shape along a new axis: iOS15.tensor_operation."""
    _same_types(values)
    return torch.stack(list(values), axis_of(axis, values[0].dim() + 1))


def _same_types(values: Sequence[Tensor]) -> None:
    dtype, rank = values[0].dtype, values[0].dim()
    if any(value.dtype is not dtype or value.dim() != rank for value in values):
        raise InputError(
            f"takes tensors of one type and rank, not {[(v.dtype, list(v.shape)) for v in values]}"
        )


@operator("split", view=True)
def split(
    x: Tensor, axis: Size, num_splits: Size | None = None, split_sizes: Sizes | None = None
) -> tuple[Tensor, ...]:
    """``x`` in pieces along axis: iOS15.tensor_operation."""
    dim = axis_of(axis, x.dim())
    if split_sizes is not None:
        sizes = ints(split_sizes)
    elif num_splits is None or int(num_splits) < 1 or x.shape[dim] % int(num_splits):
        raise InputError(f"{num_splits} equal pieces of a dimension of {x.shape[dim]}")
    else:
        sizes = [x.shape[dim] // int(num_splits)] * int(num_splits)
    if sum(sizes) != x.shape[dim] or (num_splits is not None and len(sizes) != int(num_splits)):
        raise InputError(f"pieces of {sizes} of a dimension of {x.shape[dim]}")
    return torch.split(x, sizes, dim)


@operator("tile", view=True)
def tile(x: Tensor, reps: Sizes) -> Tensor:
    """``x`` repeated along each of its dimensions: iOS15.tensor_operation."""
    times = ints(reps)
    if len(times) != x.dim():
        raise InputError(f"repetitions {times} for x {list(x.shape)}")
    shape = bounded([size * time for size, time in zip(x.shape, times, strict=True)])
    # What is repeated as a whole needs no copy of its own.
    if all(size == 1 or time == 1 for size, time in zip(x.shape, times, strict=True)):
        return x.expand(shape)
    return x.repeat(times)


@operator("pad")
def pad(x: Tensor, pad: Sizes, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    """``x`` with elements added before and after its last dimensions: iOS15.tensor_operation."""
    amounts = ints(pad)
    first = x.dim() - len(amounts) // 2
    if len(amounts) % 2 or first < 0 or min(amounts, default=0) < 0:
        raise InputError(f"amounts {amounts} for x {list(x.shape)}")
    if mode not in ("constant", "reflect", "replicate"):
        raise InputError(f"has no mode '{mode}'")
    result = x.clone()
    for dim, before, after in zip(range(first, x.dim()), amounts[::2], amounts[1::2], strict=True):
        size = x.shape[dim]
        bounded([*result.shape, (before + after + size) // max(1, size)])
        places = torch.arange(-before, size + after)
        if mode == "reflect":
            if max(before, after) > max(0, size - 1):
                raise InputError(f"reflects {max(before, after)} elements of {size}")
            places = (size - 1) - ((size - 1) - places.abs()).abs()
        inside = (places >= 0) & (places < size)
        if mode == "replicate" and max(before, after) > size:
            raise InputError(f"replicates {max(before, after)} times a dimension of {size}")
        if size:
            result = result.index_select(dim, places.clamp(0, size - 1))
        else:
            result = result.new_empty([*result.shape[:dim], before + after, *result.shape[dim + 1 :]])
        if mode == "constant":
            outside = ~inside.view(-1, *[1] * (x.dim() - 1 - dim))
            result = result.masked_fill(outside, constant_val)
    return result


@operator("sliding_windows")
def sliding_windows(x: Tensor, axis: Size, size: Size, stride: Size = 1) -> Tensor:
    """All windows of size along axis, stride apart, in a new dimension after it: iOS15.tensor_transformation."""
    dim = axis_of(axis, x.dim())
    return x.unfold(dim, int(size), int(stride)).movedim(-1, dim + 1).clone()
