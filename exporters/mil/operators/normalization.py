"""MIL's normalizations. Pages: ``iOS15.normalization``, ``iOS17.normalization`` (parameters of another type than x)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.registry import Size, Sizes, axes_of, operator, wide


@operator("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Sizes | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """``gamma * (x - mean) / sqrt(var + epsilon) + beta`` over axes: iOS15.normalization."""
    over = sorted(axes_of(axes, x.dim()))
    shape = [size if dim in over else 1 for dim, size in enumerate(x.shape)]
    result = _normalized(wide(x), over, epsilon)
    if gamma is not None:
        result = result * wide(gamma).reshape(shape)
    if beta is not None:
        result = result + wide(beta).reshape(shape)
    return result.to(x.dtype)


@operator("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    """Layer norm over all dimensions but the first two, gamma and beta per channel: iOS15.normalization."""
    if x.dim() not in (3, 4):
        raise InputError(f"takes rank 3 or 4, not {list(x.shape)}")
    result = _normalized(wide(x), list(range(2, x.dim())), epsilon)
    return _scaled(result, gamma, beta).to(x.dtype)


@operator("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """``gamma * (x - mean) / sqrt(variance + epsilon) + beta`` per channel (dimension 1): iOS15.normalization."""
    scale = torch.rsqrt(wide(variance) + _scalar(epsilon))
    result = _scaled(wide(x) - _channels(mean, x), scale, None)
    return _scaled(result, gamma, beta).to(x.dtype)


@operator("l2_norm")
def l2_norm(x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
    """``x / sqrt(sum(x ** 2) + epsilon)`` over the last three dimensions: iOS15.normalization."""
    if x.dim() < 3:
        raise InputError(f"takes rank 3 or more, not {list(x.shape)}")
    value = wide(x)
    squares = value.square().sum((-3, -2, -1), keepdim=True)
    return (value / torch.sqrt(squares + _scalar(epsilon))).to(x.dtype)


@operator("local_response_norm")
def local_response_norm(
    x: Tensor,
    size: Size,
    alpha: Tensor | float = 1e-4,
    beta: Tensor | float = 0.75,
    k: Tensor | float = 1.0,
) -> Tensor:
    """``x / (k + alpha / size * sum(x ** 2)) ** beta`` over neighbouring channels: iOS15.normalization."""
    return F.local_response_norm(wide(x), int(size), float(alpha), float(beta), float(k)).to(x.dtype)


def _normalized(x: Tensor, axes: list[int], epsilon: Tensor | float) -> Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + _scalar(epsilon))


def _scalar(value: Tensor | float) -> Tensor | float:
    return wide(value) if isinstance(value, Tensor) else value


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return wide(values).view(-1, *[1] * (x.dim() - 2))


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is not None:
        x = x * _channels(gamma, x)
    return x if beta is None else x + _channels(beta, x)
