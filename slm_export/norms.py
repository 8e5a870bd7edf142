"""Which modules are RMS norms, found out by what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
