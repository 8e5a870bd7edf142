"""MIL's activations. Pages: ``iOS15.activation``, ``iOS17.activation`` (alpha and beta of another type than x)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.registry import Size, add, axis_of, operator, wide

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros(())),
    "softsign": F.softsign,
}


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return function(wide(x)).to(x.dtype)

    return run


for _kind, _function in _PLAIN.items():
    add(_kind, _plain(_function))


@operator("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """Gaussian error linear unit, exact or by tanh or sigmoid: iOS15.activation."""
    value = wide(x)
    if mode == "EXACT":
        result = F.gelu(value)
    elif mode == "TANH_APPROXIMATION":
        result = F.gelu(value, approximate="tanh")
    elif mode == "SIGMOID_APPROXIMATION":
        result = value * torch.sigmoid(1.702 * value)
    else:
        raise InputError(f"has no mode '{mode}'")
    return result.to(x.dtype)


@operator("softmax")
def softmax(x: Tensor, axis: Size = -1) -> Tensor:
    """``exp(x) / sum(exp(x))`` along axis; NaN where all of a row is -inf: iOS15.activation."""
    return torch.softmax(wide(x), axis_of(axis, x.dim())).to(x.dtype)


@operator("elu")
def elu(x: Tensor, alpha: Tensor) -> Tensor:
    """``x`` above 0, else ``alpha * (exp(x) - 1)``: iOS15.activation."""
    value = wide(x)
    return torch.where(value > 0, value, wide(alpha) * torch.expm1(value)).to(x.dtype)


@operator("leaky_relu")
def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """``x`` from 0, else ``alpha * x``: iOS15.activation."""
    value = wide(x)
    return torch.where(value >= 0, value, wide(alpha) * value).to(x.dtype)


@operator("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """``x`` above 0, else ``alpha * x``, one alpha per channel (dimension 1): iOS15.activation."""
    value = wide(x)
    return torch.where(value > 0, value, _per_channel(alpha, x) * value).to(x.dtype)


@operator("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """``x`` from alpha, else 0: iOS15.activation."""
    value = wide(x)
    return torch.where(value >= wide(alpha), value, 0.0).to(x.dtype)


@operator("clamped_relu")
def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``min(beta, x)`` from 0, else ``min(beta, alpha * x)``: iOS15.activation."""
    value = wide(x)
    return torch.minimum(torch.where(value >= 0, value, wide(alpha) * value), wide(beta)).to(x.dtype)


@operator("linear_activation")
def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha * x + beta``: iOS15.activation."""
    return (wide(x) * wide(alpha) + wide(beta)).to(x.dtype)


@operator("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha * tanh(beta * x)``: iOS15.activation."""
    return (wide(alpha) * torch.tanh(wide(beta) * wide(x))).to(x.dtype)


@operator("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha * x + beta`` held within [0, 1]: iOS15.activation."""
    return torch.clamp(wide(x) * wide(alpha) + wide(beta), 0, 1).to(x.dtype)


@operator("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha * log(1 + exp(beta * x))``, one alpha and beta per channel (dimension 1): iOS15.activation."""
    inner = torch.logaddexp(_per_channel(beta, x) * wide(x), torch.zeros(()))
    return (_per_channel(alpha, x) * inner).to(x.dtype)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    if values.dim() != 1 or x.dim() < 2 or len(values) != x.shape[1]:
        raise InputError(f"{list(values.shape)} values for the channels of {list(x.shape)}")
    return wide(values).view(-1, *[1] * (x.dim() - 2))
