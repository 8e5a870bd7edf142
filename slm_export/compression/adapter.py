"""A matrix of floats that can be learned with few numbers: a factor on each row, and a change of low rank.

Both are merged into the matrix in the end, so nothing of them is left in the model (Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", 2021). The matrix that is computed with is always one that can be stored: rounded
to its own type, with a gradient as if it were not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_export.weights import Dense


class Adapter:
    """Factors on the rows of a matrix, and two thin matrices whose product is added to it."""

    def __init__(self, weight: Dense, rank: int) -> None:
        """Start at the matrix: factors are 1, and the product is 0.

        Given   rank: rows of the one thin matrix and columns of the other; 0: factors alone
        """
        out, columns = weight.shape
        self._matrix, self._dtype = weight.float32(), weight.dtype
        generator = torch.Generator().manual_seed(rank * columns)
        self.factors = torch.ones(out, 1).requires_grad_()
        """float32 (out, 1)"""
        self.down = (torch.randn(rank, columns, generator=generator) / columns**0.5).requires_grad_()
        """float32 (rank, in), of unit length, so that what it makes of the inputs is as large as they are"""
        self.up = torch.zeros(out, rank).requires_grad_()
        """float32 (out, rank)"""

    def matrix(self) -> Tensor:
        """Return the merged matrix, float32 (out, in), with a gradient to what is learned."""
        exact = self.factors * torch.addmm(self._matrix, self.up, self.down)
        rounded = exact.detach().to(self._dtype).float()
        return rounded + (exact - exact.detach())  # the bracket is exactly 0

    @torch.no_grad()
    def weight(self) -> Dense:
        """Return the merged matrix as it is now, in the type that it came in."""
        values = self.matrix().to(self._dtype)
        return Dense(tuple(values.shape), values.dtype, lambda: values)
