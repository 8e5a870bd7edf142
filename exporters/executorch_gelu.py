"""GELU by its tanh approximation, spelled out.

ExecuTorch's XNNPACK delegate has one GELU, by the error function, and lowers every ``aten.gelu`` to it, whatever its
``approximate`` says. The two part by up to 5e-4 at each neuron of Gemma and its kin.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _TanhGelu(nn.Module):
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).

    (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.)
    """

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + torch.tanh(inner))


def with_tanh_gelu(model: nn.Module) -> nn.Module:
    """Return the model with the formula in place of every activation that is this approximation."""
    sample = torch.linspace(-6, 6, 1001)
    expected = F.gelu(sample, approximate="tanh")
    for path, child in list(model.named_modules()):
        named = "gelu" in type(child).__name__.lower() and not any(True for _ in child.parameters())
        # By its name alone a class may hide another formula; GELU by erf is 5e-4 away.
        if named and torch.allclose(child(sample), expected, rtol=0, atol=1e-5):
            model.set_submodule(path, _TanhGelu())
    return model
