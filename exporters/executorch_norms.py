"""Norms whose mean is a product with a constant row, so that XNNPACK takes the whole of them.

XNNPACK has no mean over the last dimension: left alone, each norm splits the graph in two partitions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def with_norms(model: nn.Module) -> nn.Module:
    """Return the model with every norm exchanged for an equal whose mean is a matrix product."""
    for path, child in list(model.named_modules()):
        if (equal := _equal(child)) is not None:
            model.set_submodule(path, equal.eval())
    return model


def _equal(module: nn.Module) -> nn.Module | None:
    for made in _norms_like(module):
        sample = torch.randn(1, 3, made.weight.shape[0], generator=torch.Generator().manual_seed(0))
        # By its name alone a class may hide another formula: only an equal one takes its place.
        if torch.allclose(made(sample), module(sample), rtol=1e-5, atol=1e-5):
            return made
    return None


class _RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019)."""

    average: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.eps = eps
        self.register_buffer("average", torch.full((1, weight.shape[0]), 1 / weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.average) + self.eps) * self.weight


class _LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba, Kiros and Hinton, 2016)."""

    average: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)
        self.eps = eps
        self.register_buffer("average", torch.full((1, weight.shape[0]), 1 / weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        x = x - F.linear(x, self.average)
        return x * torch.rsqrt(F.linear(x * x, self.average) + self.eps) * self.weight + self.bias


def _norms_like(module: nn.Module) -> Iterator[_RMSNorm | _LayerNorm]:
    """Yield the norms that this module may be."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return
    if type(module) is nn.LayerNorm and module.bias is not None:
        yield _LayerNorm(weight, module.bias, module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float):
        yield _RMSNorm(weight, eps)
        yield _RMSNorm(1 + weight, eps)  # Gemma stores what it adds to 1
