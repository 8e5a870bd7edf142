"""The parts of a model as operators of our own, which `coreml_frontend` turns into Core ML's, with weights as inputs.

A converter that never sees a weight needs neither their memory nor their time, and cannot change them: a matrix
enters the graph as an input, and becomes a constant of codes and scales when the package is written
(`coreml_program`).

linear, embedding   by a matrix that is an input here
attention           writes keys and values into two states, ``keyCache`` and ``valueCache``, and reads what is there
positions           a token's place follows from the shapes of the inputs: mask columns less tokens is where it begins
rotary embedding    rows of a table that is computed in float32: angles in float16 are wrong from some 1000 tokens on
RMS norm            of values divided by their largest: squares in float16 overflow from 256 on
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.graph.dialect import AttentionShape, Position
from slm_export.weights import Weight

NAMESPACE = "slm_export"


@torch.library.custom_op(f"{NAMESPACE}::coreml_linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., in) by weight (out, in), plus bias (out,): (..., out)."""
    return x.new_zeros((*x.shape[:-1], weight.shape[0]))


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op(f"{NAMESPACE}::coreml_embedding", mutates_args=())
def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Return rows of table (rows, width): (*ids, width)."""
    return torch.zeros((*ids.shape, table.shape[1]))


@embedding.register_fake
def _(table: Tensor, ids: Tensor) -> Tensor:
    return torch.empty((*ids.shape, table.shape[1]))


@torch.library.custom_op(f"{NAMESPACE}::coreml_positions", mutates_args=())
def positions(ids: Tensor, mask: Tensor) -> Tensor:
    """Return int32 (1, tokens) where tokens (1, tokens) stand that end at the last column of mask (..., end)."""
    return torch.arange(ids.shape[1], dtype=torch.int32).unsqueeze(0)


@positions.register_fake
def _(ids: Tensor, mask: Tensor) -> Tensor:
    return torch.empty((1, ids.shape[1]), dtype=torch.int32)


@torch.library.custom_op(f"{NAMESPACE}::coreml_table", mutates_args=())
def table_rows(table: Tensor, at: Tensor) -> Tensor:
    """Return rows of a small float table (rows, width) at int32 positions (1, tokens): (1, tokens, width)."""
    return table[at]


@table_rows.register_fake
def _(table: Tensor, at: Tensor) -> Tensor:
    return table.new_empty((*at.shape, table.shape[1]))


@torch.library.custom_op(f"{NAMESPACE}::coreml_rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019)."""
    return x.clone()


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::coreml_attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: int,
    scaling: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Store key and value behind what layer ``layer`` of the caches holds, and attend to all of it.

    Given   query (1, heads, tokens, width); key, value (1, kv_heads, tokens, width); mask (1, 1, tokens, end), added to
            the scores; caches (layers, 1, kv_heads, context, width); window and softcap 0 where there is none
    Result  (1, tokens, heads, width), and the caches
    """
    return query.transpose(1, 2).contiguous(), keys.clone(), values.clone()


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: int,
    scaling: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, width = query.shape
    return query.new_empty((batch, tokens, heads, width)), torch.empty_like(keys), torch.empty_like(values)


def query_factor(scaling: float, width: int, softcap: float) -> float:
    """Return what queries are multiplied by: the scaling that is left where attention itself divides by sqrt(width)."""
    return scaling if softcap else scaling * width**0.5


class Call:
    """The inputs of the call that is being traced, where the parts find them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.names = {id(weight): name for name, weight in checkpoint.weights.items()}
        # Memory that is never touched: until a call begins, only shapes are asked for.
        self.weights: dict[str, Tensor] = {}
        self.mask = torch.zeros(1, 1, 1, 1)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None


class CoreMLDialect:
    """Makes parts for Core ML."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.call = Call(checkpoint)
        self.shapes: list[AttentionShape] = []
        """Of every cached attention, in the order of the layers."""

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return a product with a matrix that the call brings."""
        return _Linear(self.call, self._name(weight), bias)

    def embedding(self, weight: Weight) -> nn.Module:
        """Return a look-up in a table that the call brings."""
        return _Embedding(self.call, self._name(weight))

    def cached_attention(self, shape: AttentionShape, position: Position) -> nn.Module:
        """Return attention over the states that the call brings."""
        self.shapes.append(shape)
        return _CachedAttention(self.call, shape, len(self.shapes) - 1)

    def _name(self, weight: Weight) -> str:
        name = self.call.names[id(weight)]
        self.call.weights.setdefault(name, torch.empty(weight.shape))
        return name


class _Linear(nn.Module):
    def __init__(self, call: Call, name: str, bias: Tensor | None) -> None:
        super().__init__()
        self._call, self._name = call, name
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = linear(x, self._call.weights[self._name], self.bias)
        return made


class _Embedding(nn.Module):
    def __init__(self, call: Call, name: str) -> None:
        super().__init__()
        self._call, self._name = call, name

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = embedding(self._call.weights[self._name], ids)
        return made


class _CachedAttention(nn.Module):
    def __init__(self, call: Call, shape: AttentionShape, index: int) -> None:
        super().__init__()
        self._call, self._shape, self._index = call, shape, index

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call, shape = self._call, self._shape
        if call.keys is None or call.values is None:
            return query.transpose(1, 2)  # no call has begun: only shapes are asked for
        made: tuple[Tensor, Tensor, Tensor] = attention(
            query,
            key,
            value,
            call.mask,
            call.keys,
            call.values,
            self._index,
            shape.scaling,
            shape.window or 0,
            shape.softcap or 0.0,
        )
        attended, call.keys, call.values = made
        return attended
