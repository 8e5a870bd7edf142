"""RMS norms: which modules are one, found out by what they compute, and exchanged for a back end's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def exchange_norms(model: nn.Module, make: Callable[[Tensor, float], nn.Module]) -> nn.Module:
    """Return the model with ``make(weight, epsilon)`` in place of every RMS norm."""
    for path, child in list(model.named_modules()):
        if (found := rms_norm_of(child)) is not None:
            model.set_submodule(path, make(*found).eval())
    return model


def rms_norm_of(module: nn.Module) -> tuple[Tensor, float] | None:
    """Return weight float32 (width,) and epsilon of a module that computes x / sqrt(mean(x^2) + eps) * weight.

    None where it computes something else: by its name alone a class may hide another formula.
    (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.)
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not type(module).__name__.endswith("RMSNorm")
        or not isinstance(weight, Tensor)
        or not isinstance(eps, float)
    ):
        return None
    sample = torch.randn(1, 3, weight.shape[0], generator=torch.Generator().manual_seed(0))
    expected = module(sample)
    for factor in (weight, 1 + weight):  # Gemma stores what it adds to 1
        got = sample * torch.rsqrt(sample.square().mean(-1, keepdim=True) + eps) * factor
        if torch.allclose(got, expected, rtol=1e-5, atol=1e-5):
            return factor.detach(), eps
    return None
