"""MIL's reductions, sorting and running sums. Pages: ``iOS15.reduction``, ``iOS17.reduction``, ``tensor_operation``.

Sums are taken in float32. Of equal elements argmax, argmin, argsort and topk name the first (the pages leave it open).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.blob import BY_NAME
from slm_export.exporters.mil.operators.registry import Size, Sizes, add, axes_of, axis_of, operator, wide


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "reduce_prod": _product,
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


# These choose one of the elements: nothing to widen.
_CHOICES: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
}


def _choice(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: Sizes | None = None, keep_dims: Size = False) -> Tensor:
        return function(x, axes_of(axes, x.dim()), bool(keep_dims))

    return run


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: Sizes | None = None, keep_dims: Size = False) -> Tensor:
        # Integers in float64, which holds every int32; a fraction is dropped with the cast back.
        value = wide(x) if x.dtype.is_floating_point else x.double()
        return function(value, axes_of(axes, x.dim()), bool(keep_dims)).to(x.dtype)

    return run


for _kind, _function in _CHOICES.items():
    add(_kind, _choice(_function))
for _kind, _function in _REDUCTIONS.items():
    add(_kind, _reduction(_function))


def _arg(x: Tensor, axis: Size, keep_dims: Size, output_dtype: str, *, largest: bool) -> Tensor:
    if output_dtype not in ("int32", "uint16"):
        raise InputError(f"returns int32 or uint16, not '{output_dtype}'")
    find = torch.argmax if largest else torch.argmin
    found = find(wide(x), axis_of(axis, x.dim()), keepdim=bool(keep_dims))
    return found.to(BY_NAME[output_dtype].dtype)


@operator("reduce_argmax")
def reduce_argmax(x: Tensor, axis: Size = -1, keep_dims: Size = False, output_dtype: str = "int32") -> Tensor:
    """Index of the greatest element along axis: iOS15.reduction, iOS17.reduction (output_dtype)."""
    return _arg(x, axis, keep_dims, output_dtype, largest=True)


@operator("reduce_argmin")
def reduce_argmin(x: Tensor, axis: Size = -1, keep_dims: Size = False, output_dtype: str = "int32") -> Tensor:
    """Index of the least element along axis: iOS15.reduction, iOS17.reduction (output_dtype)."""
    return _arg(x, axis, keep_dims, output_dtype, largest=False)


@operator("cumsum")
def cumsum(x: Tensor, axis: Size = 0, exclusive: Size = False, reverse: Size = False) -> Tensor:
    """Running sum along axis, from its end where reversed, without the element itself where exclusive:
    iOS15.tensor_operation.
    """
    dim = axis_of(axis, x.dim())
    value = wide(x).flip(dim) if reverse else wide(x)
    result = value.cumsum(dim, dtype=value.dtype)
    if exclusive and x.shape[dim]:
        first = torch.zeros_like(result.narrow(dim, 0, 1))
        result = torch.cat([first, result.narrow(dim, 0, x.shape[dim] - 1)], dim)
    return (result.flip(dim) if reverse else result).to(x.dtype)


@operator("argsort")
def argsort(x: Tensor, axis: Size = -1, ascending: Size = False) -> Tensor:
    """Indices that sort along axis: iOS15.tensor_operation."""
    return torch.argsort(wide(x), dim=axis_of(axis, x.dim()), descending=not ascending, stable=True).to(
        torch.int32
    )


@operator("topk")
def topk(
    x: Tensor,
    k: Size = 1,
    axis: Size = -1,
    ascending: Size = False,
    sort: Size = True,
    return_indices: Size = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """The k greatest (ascending: least) elements along axis, sorted, and their indices; k -1 is all of them:
    iOS15, iOS16 and iOS17.tensor_operation.
    """
    dim = axis_of(axis, x.dim())
    count = x.shape[dim] if int(k) == -1 else int(k)
    if not 0 <= count <= x.shape[dim]:
        raise InputError(f"{count} elements of {x.shape[dim]}")
    values, indices = torch.sort(wide(x), dim=dim, descending=not ascending, stable=True)
    chosen = values.narrow(dim, 0, count).to(x.dtype, copy=True)
    if not return_indices:
        return (chosen,)
    return chosen, indices.narrow(dim, 0, count).to(BY_NAME[output_indices_dtype].dtype)
