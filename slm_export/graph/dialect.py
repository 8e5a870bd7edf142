"""The parts of a model that every back end has its own best kernel for.

transformers' modules are the source of a graph, and a few of their parts are exchanged while it is built:
matrix products, table look-ups, and attention with its KV cache. A `Dialect` makes those parts. Each exporter
has one that emits its runtime's own operators; the one here computes in plain float32 and is the oracle.

The exchange happens before tracing and not in the graph after it: a module knows what it is, while a
graph must be searched for the pattern that it became.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.weights import Weight, float_blocks

_BLOCK = 1 << 22  # values of a matrix that stand in memory as float32 at a time

Rounding = Callable[[Tensor, Weight], Tensor]
"""What a runtime makes of float32 activations (..., in) before they meet a matrix: the same, rounded or not."""


@dataclass(frozen=True)
class AttentionShape:
    """What one attention layer needs of its cache."""

    heads: int
    """Of queries."""
    kv_heads: int
    head_dim: int
    context: int
    """Positions that the cache has room for."""
    scaling: float
    window: int | None = None
    """Positions that a token sees, itself included; None: all before it."""
    softcap: float | None = None


class Position:
    """Where the tokens of the current call begin in the cache; set by the decoder before its layers run."""

    def __init__(self) -> None:
        self.start: int | torch.SymInt = 0
        self.masks: dict[tuple[int, int | None], Tensor] = {}
        """Masks of the current call, so that layers alike share one."""

    def begin(self, start: int | torch.SymInt) -> None:
        """Start a call at this position."""
        self.start = start
        self.masks = {}

    def mask(self, tokens: int | torch.SymInt, context: int, window: int | None) -> Tensor:
        """Return float32 (tokens, context), 0 where a token sees a position and -inf where it does not."""
        key = (context, window)
        if key not in self.masks:
            rows: Any = torch.arange(tokens) + self.start  # type: ignore[arg-type]
            columns = torch.arange(context).unsqueeze(0)
            seen: Tensor = columns <= rows.unsqueeze(1)
            if window is not None:
                seen = seen & (columns > rows.unsqueeze(1) - window)
            self.masks[key] = torch.where(seen, 0.0, float("-inf"))
        return self.masks[key]


class Dialect(Protocol):
    """Makes the parts that a back end computes in its own way."""

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return a module that maps float32 (..., in) to float32 (..., out)."""

    def embedding(self, weight: Weight) -> nn.Module:
        """Return a module that maps int64 ids of any shape to float32 (..., in)."""

    def cached_attention(self, shape: AttentionShape, position: Position) -> nn.Module:
        """Return a module (q, k, v) -> output that stores k and v and attends to all stored so far.

        Given   q float32 (1, heads, tokens, head_dim); k, v (1, kv_heads, tokens, head_dim), rotated already
        Result  float32 (1, tokens, heads, head_dim)
        """


class ReferenceDialect:
    """Plain float32, a weight at a time: the oracle that artifacts are compared with.

    With activations rounded as an artifact's runtime does, it isolates lowering: what remains between the two
    is the order of float operations. Without, it is the model itself.
    """

    def __init__(self, rounding: Rounding | None = None) -> None:
        self._rounding = rounding

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return a linear layer that reads its matrix in blocks at every call."""
        return _StreamedLinear(weight, bias, self._rounding)

    def embedding(self, weight: Weight) -> nn.Module:
        """Return a look-up that reads only the rows it needs."""
        return _StreamedEmbedding(weight)

    def cached_attention(self, shape: AttentionShape, position: Position) -> nn.Module:
        """Not needed: the oracle sees whole sequences, and attends as transformers does."""
        raise AssertionError("the reference has no cache")


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """Return float32 x after a round trip through int8, each row with its own scale and zero point.

    Asymmetric, -128..127, the range stretched to include 0, in the order of operations of XNNPACK's ``qd8``
    (``xnn_f32_qd8_asymmetric_quantization_params``), so that the two round alike.
    """
    low = x.amin(-1, keepdim=True).clamp_max(0)
    high = x.amax(-1, keepdim=True).clamp_min(0)
    steps = torch.where(low == high, 1.0, 255 / (high - low))
    # The zero point is exact at whichever end of the range is farther from 0.
    from_low, from_high = -128 - low * steps, 127 - high * steps
    farther_is_high = (-128 + low * steps) + (127 + high * steps) > 0
    zero = torch.where(farther_is_high, from_low, from_high).clamp(-128, 127).round()
    codes = ((x * steps).round() + zero).clamp(-128, 127)
    return (codes - zero) / steps


class _StreamedLinear(nn.Module):
    def __init__(self, weight: Weight, bias: Tensor | None, rounding: Rounding | None) -> None:
        super().__init__()
        self._weight, self._bias, self._rounding = weight, bias, rounding
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self._rounding is not None:
            x = self._rounding(x, self._weight)
        parts = [F.linear(x, block) for block in float_blocks(self._weight, _BLOCK)]
        result = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return result if self._bias is None else result + self._bias


class _StreamedEmbedding(nn.Module):
    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        rows, inverse = torch.unique(ids, return_inverse=True)
        return self._weight.rows(rows)[inverse]
