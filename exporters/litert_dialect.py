"""The parts of a model in LiteRT's own operators, with every weight an input of the graph.

A converter that never sees a weight needs neither their memory nor their time, and cannot change them: a matrix
product is traced with a matrix that is passed in, and the file's writer puts codes and scales in its place
(`litert_file`).

linear      ``BATCH_MATMUL`` by an input here, ``FULLY_CONNECTED`` by a constant in the file
embedding   ``EMBEDDING_LOOKUP``
attention   ``DYNAMIC_UPDATE_SLICE`` into caches that are inputs and outputs, as LiteRT-LM wants them:
            keys (1, heads, context, width), values (1, heads, width, context)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.adapter_matrices import NO_PLACES, A, B, Places
from slm_export.graph.dialect import AttentionShape, Position
from slm_export.weights import Weight

MASKED = -0.7 * torch.finfo(torch.float32).max
"""What hides a position: LiteRT-LM's own value. Infinite it would make NaN of a row that sees nothing."""


class Call:
    """The inputs of the call that is being traced, where the parts find them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        # Memory that is never touched: until a call begins, only shapes are asked for.
        self.weights: Mapping[str, Tensor] = {name: torch.empty(shape) for name, shape in shapes.items()}
        self.adapted = False
        """Whether the matrices of an adapter are among the inputs that are used."""
        self.start: Tensor = torch.zeros(1, dtype=torch.int32)
        self.masks: dict[int | None, Tensor] = {}
        """Additive mask (1, 1, tokens, context) by window."""
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}


class LiteRTDialect:
    """Makes parts for LiteRT; `litert_graph` has imported the operators."""

    def __init__(self, checkpoint: Checkpoint, places: Places = NO_PLACES) -> None:
        self._names = {id(weight): name for name, weight in checkpoint.weights.items()}
        self.places = places
        shapes: dict[str, tuple[int, ...]] = {name: w.shape for name, w in checkpoint.weights.items()}
        self.call = Call(shapes | places.inputs)
        self.shapes: list[AttentionShape] = []
        """Of every cached attention, in the order of the layers."""

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return a product with a matrix that the call brings."""
        name = self._names[id(weight)]
        part = Linear(self.call, name, bias)
        return Place(self.call, part) if name in self.places.shapes else part

    def embedding(self, weight: Weight) -> nn.Module:
        """Return a look-up in a table that the call brings."""
        return Embedding(self.call, self._names[id(weight)], weight.shape[1])

    def cached_attention(self, shape: AttentionShape, position: Position) -> nn.Module:
        """Return attention over the caches that the call brings."""
        self.shapes.append(shape)
        return _CachedAttention(self.call, shape, len(self.shapes) - 1)


class Linear(nn.Module):
    """x (..., in) -> (..., out)."""

    def __init__(self, call: Call, name: str, bias: Tensor | None) -> None:
        super().__init__()
        self.name = name
        self._call = call
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the matrix of the call."""
        y: Tensor = torch.ops.tfl.batch_matmul(x, self._call.weights[self.name], False, True)
        return y if self.bias is None else y + self.bias


class Place(nn.Module):
    """A product, and what an adapter adds to it: x (1, tokens, in) -> (1, tokens, out)."""

    def __init__(self, call: Call, part: Linear) -> None:
        super().__init__()
        self.part, self.place = part, part.name.removesuffix(".weight")
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, with the matrices of an adapter where the call brings them."""
        y: Tensor = self.part(x)
        if not self._call.adapted:
            return y
        first, second = (self._call.weights[self.place + factor] for factor in (A, B))
        multiply = torch.ops.tfl.batch_matmul
        added: Tensor = multiply(multiply(x, first, False, False), second, False, False)
        return y + added


class Embedding(nn.Module):
    """Integer ids of any shape -> (..., width)."""

    def __init__(self, call: Call, name: str, width: int) -> None:
        super().__init__()
        self.name, self.width = name, width
        self._call = call

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows of the table of the call."""
        table = self._call.weights[self.name]
        rows: Tensor = torch.ops.tfl.embedding_lookup(ids.reshape(-1).to(torch.int32), table)
        return rows.reshape(*ids.shape, self.width)


class _CachedAttention(nn.Module):
    def __init__(self, call: Call, shape: AttentionShape, index: int) -> None:
        super().__init__()
        self.shape, self.index = shape, index
        self._call = call

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call, shape = self._call, self.shape
        if value.shape[3] != shape.head_dim:
            raise InputError("attention whose keys and values differ in width cannot be exported to litert")
        if self.index not in call.keys:
            return query.transpose(1, 2)  # no call has begun: only shapes are asked for
        ops: Any = torch.ops.litert_torch
        zero, start = torch.zeros((), dtype=torch.int32), call.start[0]
        keys = ops.dynamic_update_slice(call.keys[self.index], key, [zero, zero, start, zero])
        values = ops.dynamic_update_slice(
            call.values[self.index], value.transpose(2, 3), [zero, zero, zero, start]
        )
        call.keys[self.index], call.values[self.index] = keys, values
        heads, tokens = query.shape[1], query.shape[2]
        groups = heads // shape.kv_heads
        # Query heads of one key-value head stand below each other: keys and values are never repeated.
        query = (query * shape.scaling).reshape(1, shape.kv_heads, groups * tokens, shape.head_dim)
        scores = ops.bmm_4d(query, keys)
        if shape.softcap is not None:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        window = shape.window if shape.window is not None and shape.window < shape.context else None
        mask = call.masks[window]
        scores = scores + (torch.cat([mask] * groups, dim=2) if groups > 1 else mask)
        attended: Tensor = ops.bmm_4d(scores.softmax(dim=-1), values)
        return attended.reshape(1, heads, tokens, shape.head_dim).transpose(1, 2)


def windows(shapes: list[AttentionShape]) -> Iterator[int]:
    """Yield every window that hides a position of the context."""
    yield from sorted({s.window for s in shapes if s.window is not None and s.window < s.context})


def windowed(mask: Tensor, positions: Tensor, window: int) -> Tensor:
    """Return a mask (1, 1, tokens, context) that also hides what lies ``window`` or more behind.

    Given   positions: int32 (tokens,)
    """
    columns = torch.arange(mask.shape[-1], dtype=torch.int32)
    near = columns.unsqueeze(0) > positions.unsqueeze(1) - window
    return torch.where(near, mask, torch.tensor(MASKED))
