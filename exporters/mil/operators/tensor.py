"""MIL's operators that make tensors. Pages: ``iOS15.tensor_operation``, ``iOS16``, ``iOS17.quantization_ops``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.blob import BY_NAME
from slm_export.exporters.mil.operators.registry import (
    Size,
    Sizes,
    axis_of,
    bounded,
    ints,
    operator,
    same_type,
    wide,
)


@operator("shape")
def shape(x: Tensor) -> Tensor:
    """The shape of x, int32: iOS15.tensor_operation."""
    return torch.tensor(x.shape, dtype=torch.int32)


@operator("fill")
def fill(shape: Sizes, value: Tensor | float = 0.0) -> Tensor:
    """A tensor of a shape that is value everywhere: iOS15.tensor_operation."""
    return _filled(ints(shape), value)


@operator("fill_like", since=16)
def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """A tensor of the shape of another that is value everywhere: iOS16.tensor_operation."""
    return _filled(list(ref_tensor.shape), value)


def _filled(shape: list[int], value: Tensor | float) -> Tensor:
    scalar = torch.as_tensor(value)
    if scalar.numel() != 1:
        raise InputError(f"a value of shape {list(scalar.shape)}")
    return (
        scalar.reshape([1] * len(shape)).expand(bounded(shape)).clone(memory_format=torch.contiguous_format)
    )


@operator("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """``start, start + step, ...`` up to before end: iOS15.tensor_operation."""
    same_type(start, end)
    same_type(start, step)
    first, last, by = start.item(), end.item(), step.item()
    if not by or not all(math.isfinite(value) for value in (first, last, by)):
        raise InputError(f"counts from {first} to {last} by {by}")
    count = bounded([max(0, math.ceil((last - first) / by))])[0]
    places = torch.arange(count, dtype=torch.float32 if start.dtype.is_floating_point else start.dtype)
    return (places * wide(step) + wide(start)).to(start.dtype)


@operator("one_hot")
def one_hot(
    indices: Tensor,
    one_hot_vector_size: Size,
    axis: Size = -1,
    on_value: Tensor | int = 1,
    off_value: Tensor | int = 0,
) -> Tensor:
    """``on_value`` where a position along the new axis is the index, else ``off_value``: iOS15.tensor_operation."""
    dim = axis_of(axis, indices.dim() + 1)
    size = int(one_hot_vector_size)
    bounded([*indices.shape, size])
    places = torch.arange(size).view(-1, *[1] * (indices.dim() - dim))
    on, off = (
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int32)
        for value in (on_value, off_value)
    )
    same_type(on, off)
    return torch.where(indices.to(torch.int64).unsqueeze(dim) == places, on, off)


@operator("non_zero")
def non_zero(x: Tensor) -> Tensor:
    """Indices of the elements that are not 0, a row each, int32: iOS15.tensor_operation."""
    return torch.nonzero(x).to(torch.int32)


@operator("band_part")
def band_part(x: Tensor, lower: Size = -1, upper: Size = -1) -> Tensor:
    """``x`` with 0 outside of a band around the diagonal of its last two dimensions: iOS15.tensor_operation."""
    below = torch.arange(x.shape[-2]).unsqueeze(1) - torch.arange(x.shape[-1])
    inside = torch.ones_like(below, dtype=torch.bool)
    if int(lower) >= 0:
        inside &= below <= int(lower)
    if int(upper) >= 0:
        inside &= -below <= int(upper)
    return x.masked_fill(~inside, 0)


@operator("quantize", since=17)
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Size | None = None,
) -> Tensor:
    """``round(input / scale) + zero_point`` held within uint8 or int8: iOS17.quantization_ops."""
    if output_dtype not in ("int8", "uint8"):
        raise InputError(f"returns int8 or uint8, not '{output_dtype}'")
    limits = torch.iinfo(BY_NAME[output_dtype].dtype)
    codes = torch.round(wide(input) / _along(scale, input, axis))
    if zero_point is not None:
        codes = codes + _along(zero_point, input, axis)
    return codes.clamp(limits.min, limits.max).to(BY_NAME[output_dtype].dtype)


@operator("dequantize", since=17)
def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Size | None = None
) -> Tensor:
    """``scale * (input - zero_point)``: iOS17.quantization_ops."""
    codes = input.float()
    if zero_point is not None:
        codes = codes - _along(zero_point, input, axis)
    return (codes * _along(scale, input, axis)).to(scale.dtype)


def _along(values: Tensor, x: Tensor, axis: Size | None) -> Tensor:
    if not values.dim():
        return values.float()
    if axis is None or values.dim() > 1 or len(values) != x.shape[axis_of(axis, x.dim())]:
        raise InputError(f"{list(values.shape)} values for x {list(x.shape)}")
    return values.float().view([-1 if dim == axis_of(axis, x.dim()) else 1 for dim in range(x.dim())])
