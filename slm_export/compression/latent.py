"""A matrix on the integer grid that can be learned: real numbers behind its codes and scales.

The matrix that is computed with is always one of the grid; the gradient goes through its rounding as if that were not
there (Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013; for scales Esser et al.,
"Learned Step Size Quantization", 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_export.weights import CODE_RANGE, SMALLEST_SCALE, Quantized, grid_scale, quantized

_INSIDE = 0.49
"""How far a number may lie from its code at first: rounding still gives that code."""


class Latent:
    """Numbers behind the codes, in units of a step, and a factor on each scale."""

    def __init__(self, weight: Quantized, original: Tensor | None = None) -> None:
        """Start at a matrix of the grid.

        Given   original: float32 (out, in), the values it was rounded from. Numbers begin on their side of the code,
                so that codes that were nearly others turn first
        """
        codes = weight.codes().float()
        if original is not None:
            exact = (original.view(*weight.scales.shape, -1) / weight.scales.unsqueeze(-1)).view(codes.shape)
            codes = exact.clamp(codes - _INSIDE, codes + _INSIDE)
        self.bits, self._scales = weight.bits, weight.scales
        self.codes = codes.requires_grad_()
        """float32 (out, in)"""
        self.factors = torch.ones_like(weight.scales).requires_grad_()
        """float32 (out, groups)"""

    def matrix(self) -> Tensor:
        """Return the matrix, float32 (out, in), with a gradient to codes and factors."""
        codes, scales = (
            _through(self._rounded(), self.codes),
            _through(self._grid(), self._scales * self.factors),
        )
        return (codes.view(*scales.shape, -1) * scales.unsqueeze(-1)).view(codes.shape)

    @torch.no_grad()
    def clip(self) -> None:
        """Bring numbers that have left the range of codes back to its ends, so that they can return."""
        low, high = CODE_RANGE[self.bits]
        self.codes.clamp_(low - _INSIDE, high + _INSIDE)
        self.factors.clamp_(0.25, 4)

    def weight(self) -> Quantized:
        """Return the matrix as it is now."""
        return quantized(self._rounded().to(torch.int8), self._grid(), self.bits)

    def _rounded(self) -> Tensor:
        return self.codes.detach().round().clamp_(*CODE_RANGE[self.bits])

    def _grid(self) -> Tensor:
        return grid_scale((self._scales * self.factors.detach()).clamp_min(SMALLEST_SCALE))


def _through(rounded: Tensor, exact: Tensor) -> Tensor:
    """Return the value of one with the gradient of the other."""
    return rounded + (exact - exact.detach())  # the bracket is exactly 0
