"""MIL's products with matrices: linear, matmul, einsum, conv and attention.

Products are summed in float32. A constant matrix is used whole where it is kept ready, else in blocks of rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.constant import Constant, dense
from slm_export.exporters.mil.operators.registry import Size, Sizes, ints, operator, same_type, wide


@operator("linear", lazy=("weight",))
def linear(x: Tensor, weight: Tensor | Constant, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: iOS15.linear, iOS17.linear (weight and bias of another type than x)."""
    if len(weight.shape) != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"a matrix {list(weight.shape)} for x {list(x.shape)}")
    return _product(x, weight, None if bias is None else wide(bias))


def _product(x: Tensor, weight: Tensor | Constant, bias: Tensor | None) -> Tensor:
    value = wide(x)
    whole = wide(weight) if isinstance(weight, Tensor) else weight.ready()
    if not x.dtype.is_floating_point:
        product = value @ wide(dense(weight)).mT
        return (product if bias is None else product + bias).to(x.dtype)
    if whole is not None:
        return F.linear(value, whole, bias).to(x.dtype)
    assert isinstance(weight, Constant)
    product = torch.cat([F.linear(value, block) for block in weight.blocks()], dim=-1)
    return (product if bias is None else product + bias).to(x.dtype)


@operator("matmul", lazy=("x", "y"))
def matmul(
    x: Tensor | Constant,
    y: Tensor | Constant,
    transpose_x: Size = False,
    transpose_y: Size = False,
) -> Tensor:
    """Batched matrix product with NumPy's broadcasting: iOS15.linear, iOS17.linear (a constant of another type)."""
    if isinstance(x, Tensor) and isinstance(y, Constant) and len(y.shape) == 2 and transpose_y:
        return _product(_transposed(x, transpose_x), y, None)
    # The type of the result is that of the operand that is not constant.
    dtype = y.dtype if isinstance(x, Constant) else x.dtype
    if isinstance(x, Constant) == isinstance(y, Constant) and x.dtype != y.dtype:
        raise InputError(f"takes operands of one type, not {x.dtype} and {y.dtype}")
    left, right = (_transposed(_ready(v), t) for v, t in ((x, transpose_x), (y, transpose_y)))
    return torch.matmul(left, right).to(dtype)


def _ready(x: Tensor | Constant) -> Tensor:
    if isinstance(x, Tensor):
        return wide(x)
    kept = x.ready()
    return wide(x.tensor()) if kept is None else kept


def _transposed(x: Tensor, transpose: Size) -> Tensor:
    return x.mT if transpose and x.dim() > 1 else x


@operator("einsum")
def einsum(values: list[Tensor], equation: str) -> Tensor:
    """Product of two tensors by an equation; dimensions of size 1 broadcast: iOS15.linear."""
    if len(values) != 2:
        raise InputError(f"takes two tensors, not {len(values)}")
    same_type(*values)
    return torch.einsum(equation, *(wide(value) for value in values)).to(values[0].dtype)


@operator("scaled_dot_product_attention", since=18)
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """``softmax(query @ key.T / sqrt(E) + attn_mask) @ value``: iOS18.transformers.

    Leading dimensions are equal (grouped queries have to be tiled). A row whose positions are all masked is NaN, as
    the page's formula has it.
    """
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2] or query.dim() < 3:
        raise InputError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not match"
        )
    same_type(query, key)
    same_type(query, value)
    scores = torch.matmul(wide(query), wide(key).mT) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        # In place, so that torch refuses a mask that does not broadcast to the scores.
        if attn_mask.dtype == torch.bool:
            scores.masked_fill_(~attn_mask, -math.inf)
        else:
            scores += wide(attn_mask)
    return torch.matmul(torch.softmax(scores, -1), wide(value)).to(query.dtype)


@operator("conv", lazy=("weight",))
def conv(
    x: Tensor,
    weight: Tensor | Constant,
    pad_type: str = "valid",
    strides: Sizes | None = None,
    pad: Sizes | None = None,
    dilations: Sizes | None = None,
    groups: Size = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolution over one to three dimensions: iOS15.conv, iOS17.conv (weight and bias of another type)."""
    spatial = x.dim() - 2
    if not 1 <= spatial <= 3 or len(weight.shape) != x.dim():
        raise InputError(f"a kernel {list(weight.shape)} for x {list(x.shape)}")
    stride = [1] * spatial if strides is None else ints(strides)
    dilation = [1] * spatial if dilations is None else ints(dilations)
    reach = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilation, strict=True)]
    value = F.pad(wide(x), _padding(pad_type, pad, list(x.shape[2:]), reach, stride))
    run = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    whole = wide(weight) if isinstance(weight, Tensor) else weight.ready()
    if whole is None and int(groups) == 1:
        assert isinstance(weight, Constant)
        parts = [run(value, block, None, stride, 0, dilation) for block in weight.blocks()]
        result = torch.cat(parts, dim=1)
    else:
        result = run(
            value, _ready(weight) if whole is None else whole, None, stride, 0, dilation, int(groups)
        )
    if bias is not None:
        result = result + wide(bias).view(-1, *[1] * spatial)
    return result.to(x.dtype)


def _padding(
    type: str, pad: Sizes | None, sizes: list[int], reach: list[int], stride: list[int]
) -> list[int]:
    """Return what to add before and after each dimension, the last dimension first, as torch has it.

    ``same`` makes the result ceil(size / stride) long, what is odd added after, ``same_lower`` before.
    """
    pairs = []
    given = [0] * 2 * len(sizes) if pad is None or type != "custom" else ints(pad)
    for dim, size in enumerate(sizes):
        before, after = given[2 * dim], given[2 * dim + 1]
        if type in ("same", "same_lower"):
            total = max(0, (-(-size // stride[dim]) - 1) * stride[dim] + reach[dim] - size)
            before, after = total // 2, total - total // 2
            if type == "same_lower":
                before, after = after, before
        elif type not in ("valid", "custom"):
            raise InputError(f"has no padding '{type}'")
        pairs.append((before, after))
    return [amount for pair in reversed(pairs) for amount in pair]
