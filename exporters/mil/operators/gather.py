"""MIL's gathers and scatters. Pages: ``iOS15.scatter_gather``, ``iOS16`` (batch_dims), ``iOS17`` (validate_indices).

An index out of bounds is an error whatever ``validate_indices`` says: without it Core ML leaves the result undefined,
and what is undefined cannot be verified. From iOS 17 on a negative index is out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.constant import Constant, dense
from slm_export.exporters.mil.operators.registry import Size, axis_of, operator, wide

_FEW = 8  # indices that are looked at in Python rather than by torch


def _checked(indices: Tensor, size: int, *, negative: bool) -> Tensor:
    """Return indices counted from the front, int64."""
    if indices.dtype.is_floating_point or indices.dtype == torch.bool:
        raise InputError(f"takes integer indices, not {indices.dtype}")
    index = indices.to(torch.int64)
    if not index.numel():
        return index
    if index.numel() <= _FEW:
        values = index.flatten().tolist()
        low, high = min(values), max(values)
    else:
        low, high = (int(bound) for bound in torch.aminmax(index))
    if low < (-size if negative else 0) or high >= size:
        at = low if low < 0 else high
        raise InputError(f"index {at} is out of bounds of a dimension of {size}")
    return torch.where(index < 0, index + size, index) if low < 0 else index


def _moved(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # torch moves uint16 and uint32 in few places; to move them their bits are enough.
    same_size = {torch.uint16: torch.int16, torch.uint32: torch.int32}.get(x.dtype)
    return function(x) if same_size is None else function(x.view(same_size)).view(x.dtype)


def _gather(x: Tensor | Constant, indices: Tensor, axis: Size, batch_dims: Size, *, negative: bool) -> Tensor:
    dim, batch = axis_of(axis, len(x.shape)), int(batch_dims)
    index = _checked(indices, x.shape[dim], negative=negative)
    shape = (*x.shape[:dim], *indices.shape[batch:], *x.shape[dim + 1 :])
    if isinstance(x, Constant) and dim == 0 and not batch:
        if index.numel() <= _FEW:
            return x.take(index.flatten()).reshape(shape)
        rows, inverse = torch.unique(index, return_inverse=True)
        return x.take(rows)[inverse.flatten()].reshape(shape)
    tensor = dense(x)
    if not batch:
        return _moved(lambda t: t.index_select(dim, index.flatten()), tensor).reshape(shape)
    if not 0 <= batch <= dim or tensor.shape[:batch] != indices.shape[:batch]:
        raise InputError(f"{batch} batch dimensions of x {list(x.shape)} and indices {list(indices.shape)}")
    count, before, after = (
        math.prod(part) for part in (x.shape[:batch], x.shape[batch:dim], x.shape[dim + 1 :])
    )
    flat = tensor.reshape(count, before, x.shape[dim], after)
    chosen = index.reshape(count, 1, -1, 1).expand(-1, before, -1, after)
    return _moved(lambda t: t.gather(2, chosen), flat).reshape(shape)


@operator("gather", lazy=("x",))
def gather_15(x: Tensor | Constant, indices: Tensor, axis: Size = 0, batch_dims: Size = 0) -> Tensor:
    """Slices of x along axis: iOS15.scatter_gather, iOS16 (batch_dims)."""
    return _gather(x, indices, axis, batch_dims, negative=True)


@operator("gather", since=17, lazy=("x",))
def gather(
    x: Tensor | Constant,
    indices: Tensor,
    axis: Size = 0,
    batch_dims: Size = 0,
    validate_indices: Size = False,
) -> Tensor:
    """Slices of x along axis: iOS17.scatter_gather."""
    return _gather(x, indices, axis, batch_dims, negative=False)


def _gather_along_axis(x: Tensor, indices: Tensor, axis: Size, *, negative: bool) -> Tensor:
    dim = axis_of(axis, x.dim())
    index = _checked(indices, x.shape[dim], negative=negative)
    return _moved(lambda t: t.gather(dim, index), x)


@operator("gather_along_axis")
def gather_along_axis_15(x: Tensor, indices: Tensor, axis: Size = 0) -> Tensor:
    """``x[.., indices[.., i, ..], ..]``: iOS15.scatter_gather."""
    return _gather_along_axis(x, indices, axis, negative=True)


@operator("gather_along_axis", since=17)
def gather_along_axis(x: Tensor, indices: Tensor, axis: Size = 0, validate_indices: Size = False) -> Tensor:
    """``x[.., indices[.., i, ..], ..]``: iOS17.scatter_gather."""
    return _gather_along_axis(x, indices, axis, negative=False)


def _gather_nd(x: Tensor, indices: Tensor, batch_dims: Size, *, negative: bool) -> Tensor:
    batch, depth = int(batch_dims), indices.shape[-1] if indices.dim() else 0
    if (
        not depth
        or batch + depth > x.dim()
        or batch >= indices.dim()
        or x.shape[:batch] != indices.shape[:batch]
    ):
        raise InputError(
            f"indices {list(indices.shape)} with {batch} batch dimensions into x {list(x.shape)}"
        )
    at: list[Tensor] = [
        torch.arange(size).view(-1, *[1] * (indices.dim() - 2 - dim))
        for dim, size in enumerate(x.shape[:batch])
    ]
    at += [_checked(indices[..., k], x.shape[batch + k], negative=negative) for k in range(depth)]
    return _moved(lambda t: t[tuple(at)], x)


@operator("gather_nd")
def gather_nd_15(x: Tensor, indices: Tensor, batch_dims: Size = 0) -> Tensor:
    """``x[indices[i]]`` for each i: iOS15.scatter_gather, iOS16 (batch_dims)."""
    return _gather_nd(x, indices, batch_dims, negative=True)


@operator("gather_nd", since=17)
def gather_nd(x: Tensor, indices: Tensor, batch_dims: Size = 0, validate_indices: Size = False) -> Tensor:
    """``x[indices[i]]`` for each i: iOS17.scatter_gather."""
    return _gather_nd(x, indices, batch_dims, negative=False)


def _scattered(data: Tensor, at: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Return data with updates applied, each at its position in data when flat."""
    if at.shape != updates.shape or data.dtype != updates.dtype:
        raise InputError(
            f"{updates.dtype} updates {list(updates.shape)} for {data.dtype} places {list(at.shape)}"
        )
    flat, at, values = wide(data).flatten().clone(), at.flatten(), wide(updates).flatten()
    if mode == "update":
        flat[at] = values
    elif mode in ("add", "sub"):
        flat.index_add_(0, at, values, alpha=1 if mode == "add" else -1)
    elif mode in ("mul", "max", "min"):
        flat.scatter_reduce_(0, at, values, {"mul": "prod", "max": "amax", "min": "amin"}[mode])
    elif mode == "div":
        divisor = torch.ones_like(flat).scatter_reduce_(0, at, values, "prod")
        flat = torch.div(flat, divisor, rounding_mode=None if flat.dtype.is_floating_point else "trunc")
    else:
        raise InputError(f"has no mode '{mode}'")
    return flat.view(data.shape).to(data.dtype)


def _positions(data: Tensor) -> Tensor:
    return torch.arange(data.numel()).view(data.shape)


def _scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Size, mode: str, *, negative: bool
) -> Tensor:
    dim = axis_of(axis, data.dim())
    index = _checked(indices, data.shape[dim], negative=negative)
    if index.dim() != 1:
        raise InputError(f"takes a vector of indices, not {list(indices.shape)}")
    return _scattered(data, _positions(data).index_select(dim, index), updates, mode)


@operator("scatter")
def scatter_15(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Size = 0, mode: str = "update"
) -> Tensor:
    """``data`` with slices along axis replaced or combined: iOS15.scatter_gather."""
    return _scatter(data, indices, updates, axis, mode, negative=True)


@operator("scatter", since=17)
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Size = 0,
    mode: str = "update",
    validate_indices: Size = False,
) -> Tensor:
    """``data`` with slices along axis replaced or combined: iOS17.scatter_gather."""
    return _scatter(data, indices, updates, axis, mode, negative=False)


def _scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Size, mode: str, *, negative: bool
) -> Tensor:
    dim = axis_of(axis, data.dim())
    index = _checked(indices, data.shape[dim], negative=negative)
    return _scattered(data, _positions(data).gather(dim, index), updates, mode)


@operator("scatter_along_axis")
def scatter_along_axis_15(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Size = 0, mode: str = "add"
) -> Tensor:
    """``data[.., indices[.., i, ..], ..]`` replaced or combined: iOS15.scatter_gather."""
    return _scatter_along_axis(data, indices, updates, axis, mode, negative=True)


@operator("scatter_along_axis", since=17)
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Size = 0,
    mode: str = "add",
    validate_indices: Size = False,
) -> Tensor:
    """``data[.., indices[.., i, ..], ..]`` replaced or combined: iOS17.scatter_gather."""
    return _scatter_along_axis(data, indices, updates, axis, mode, negative=False)


@operator("scatter_nd")
def scatter_nd_15(data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add") -> Tensor:
    """``data[indices[i]]`` replaced or combined: iOS15.scatter_gather."""
    return _scattered(data, _gather_nd(_positions(data), indices, 0, negative=True), updates, mode)


@operator("scatter_nd", since=17)
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: Size = False
) -> Tensor:
    """``data[indices[i]]`` replaced or combined: iOS17.scatter_gather."""
    return _scattered(data, _gather_nd(_positions(data), indices, 0, negative=False), updates, mode)
