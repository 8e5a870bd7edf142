"""MIL's slices. Pages: ``iOS15.tensor_transformation``, ``iOS17``, ``iOS18.tensor_transformation`` (slice_update).

Slices mean what NumPy's do: indices count from the end where negative, and end at the tensor's bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.registry import Sizes, ints, operator


def _slices(
    x: Tensor,
    begin: Sizes,
    end: Sizes,
    stride: Sizes | None,
    begin_mask: Sizes | None,
    end_mask: Sizes | None,
    squeeze_mask: Sizes | None,
) -> tuple[tuple[int | slice, ...], list[int]]:
    """Return what to index x with, and the dimensions of the result that are to be read backwards."""
    rank = x.dim()
    starts, stops = ints(begin), ints(end)
    steps = [1] * rank if stride is None else ints(stride)
    from_start, to_stop, single = (
        [False] * rank if mask is None else ints(mask) for mask in (begin_mask, end_mask, squeeze_mask)
    )
    if not len(starts) == len(stops) == len(steps) == len(from_start) == len(to_stop) == len(single) == rank:
        raise InputError(f"slices x {list(x.shape)} by vectors of another length")
    index: list[int | slice] = []
    backwards: list[int] = []
    for dim, size in enumerate(x.shape):
        start = None if from_start[dim] else starts[dim]
        if single[dim]:
            place = start or 0
            if not -size <= place < size:
                raise InputError(f"index {place} is out of bounds of a dimension of {size}")
            index.append(place % size)
            continue
        if not steps[dim]:
            raise InputError("a stride of 0")
        first, last, step = slice(start, None if to_stop[dim] else stops[dim], steps[dim]).indices(size)
        if step < 0:
            # torch has no negative steps: the same elements forwards, then turned round.
            count = max(0, (first - last - step - 1) // -step)
            first, last, step = first + (count - 1) * step, first + 1, -step
            backwards.append(sum(isinstance(part, slice) for part in index))
            if not count:
                first = last = 0
        index.append(slice(first, max(first, last), step))
    return tuple(index), backwards


@operator("slice_by_index", view=True)
def slice_by_index(
    x: Tensor,
    begin: Sizes,
    end: Sizes,
    stride: Sizes | None = None,
    begin_mask: Sizes | None = None,
    end_mask: Sizes | None = None,
    squeeze_mask: Sizes | None = None,
) -> Tensor:
    """``x[begin : end : stride, ...]``; a mask leaves begin or end out, or takes begin alone: iOS15, iOS17."""
    index, backwards = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x[index]
    return result.flip(backwards) if backwards else result


@operator("slice_by_size", view=True)
def slice_by_size(x: Tensor, begin: Sizes, size: Sizes) -> Tensor:
    """``x[begin : begin + size, ...]``; size -1 is all that is left: iOS15.tensor_transformation, iOS17."""
    starts, sizes = ints(begin), ints(size)
    if not len(starts) == len(sizes) == x.dim():
        raise InputError(f"slices x {list(x.shape)} by vectors of another length")
    index = []
    for start, count, length in zip(starts, sizes, x.shape, strict=True):
        first = start + length if start < 0 else start
        stop = length if count == -1 else first + count
        if not 0 <= first <= stop <= length:
            raise InputError(f"{count} elements from {start} on of a dimension of {length}")
        index.append(slice(first, stop))
    return x[tuple(index)]


@operator("slice_update", since=18)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Sizes,
    end: Sizes,
    stride: Sizes | None = None,
    begin_mask: Sizes | None = None,
    end_mask: Sizes | None = None,
    squeeze_mask: Sizes | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """``x`` with ``x[begin : end : stride, ...] = update``: iOS18.tensor_transformation.

    Given   in_place: x itself is changed, because nothing else will ever look at it
    """
    index, backwards = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    # What `tile` made without a copy has one element in many places.
    result = x if in_place and 0 not in x.stride() else x.clone(memory_format=torch.contiguous_format)
    place = result[index]
    if place.shape != update.shape or x.dtype != update.dtype:
        raise InputError(
            f"an update {update.dtype} {list(update.shape)} of a slice {x.dtype} {list(place.shape)}; "
            "they have to be of one type and shape"
        )
    place.copy_(update.flip(backwards) if backwards else update)
    return result
