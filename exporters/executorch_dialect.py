"""The parts of a model in ExecuTorch's own operators, in the forms that its XNNPACK partitioner recognises.

linear      int4 or int8 codes and scales, activations quantized to int8 per token when they arrive
embedding   ``quantized_decomposed.embedding_4bit`` and ``embedding_byte``
attention   ``llama.update_cache`` and ``llama.custom_sdpa``, the kernels of the stock LLM runners
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.executorch_places import Matrices, Place
from slm_export.exporters.executorch_stand_in import xnnpack_nibbles
from slm_export.graph.dialect import AttentionShape, Position, fake_quantize_per_token
from slm_export.graph.model import refuse_unknown
from slm_export.weights import CODE_RANGE, Dense, Quantized, Weight, on_grid


def xnnpack_rounding(x: Tensor, weight: Weight) -> Tensor:
    """Return activations as XNNPACK rounds them: to int8 per token for codes, to float16 for a float16 matrix."""
    weight = on_grid(weight)
    if isinstance(weight, Quantized):
        return fake_quantize_per_token(x)
    return x.to(torch.float16).to(torch.float32) if weight.dtype == torch.float16 else x


_WHOLE = "slm_export_whole"
"""Our encoders' attention among transformers' attention functions."""


class ExecuTorchDialect:
    """Makes parts for XNNPACK; the exporter's ``ready`` has imported the operators."""

    def __init__(self, checkpoint: Checkpoint | None = None, places: Collection[str] = ()) -> None:
        """``places``: names of the checkpoint's weights that adapters may add to."""
        self._places = {id(checkpoint.weights[name]): name for name in places} if checkpoint else {}
        self.matrices = Matrices()

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return a linear layer on the codes themselves, or on float32 or float16 values."""
        place = self._places.get(id(weight))
        weight = on_grid(weight)
        part: nn.Module
        if isinstance(weight, Quantized):
            part = _QuantizedLinear(weight, bias)
        else:
            part = _HalfLinear(weight, bias) if weight.dtype == torch.float16 else _FloatLinear(weight, bias)
        return part if place is None else Place(part, place, self.matrices)

    def embedding(self, weight: Weight) -> nn.Module:
        """Return a table look-up."""
        weight = on_grid(weight)
        return _QuantizedEmbedding(weight) if isinstance(weight, Quantized) else _FloatEmbedding(weight)

    def cached_attention(self, shape: AttentionShape, position: Position) -> nn.Module:
        """Return attention over a cache of ``shape.context`` positions."""
        return (_CachedAttention if shape.softcap is None else _SoftcappedAttention)(shape, position)


class _QuantizedLinear(nn.Module):
    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        super().__init__()
        per_channel = weight.bits == 8
        self.bits, self.group = weight.bits, weight.group
        self.register_buffer("codes", weight.codes())
        scales = weight.scales.squeeze(1) if per_channel else weight.scales
        self.register_buffer("scales", scales)
        kind = torch.int64 if per_channel else torch.int32
        self.register_buffer("zeros", torch.zeros(scales.shape, dtype=kind))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        ops: Any = torch.ops.quantized_decomposed
        scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        codes = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        x = ops.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)
        return F.linear(x, self._matrix(), self.bias)

    def _matrix(self) -> Tensor:
        ops: Any = torch.ops.quantized_decomposed
        low, high = CODE_RANGE[self.bits]
        args = (self.codes, self.scales, self.zeros)
        if self.bits == 8:
            matrix: Tensor = ops.dequantize_per_channel(*args, 0, low, high, torch.int8)
        else:
            matrix = ops.dequantize_per_channel_group(*args, low, high, torch.int8, self.group, torch.float32)
        return matrix


class _HalfLinear(nn.Module):
    def __init__(self, weight: Dense, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.load(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(torch.float16), self.weight).to(torch.float32)
        return y if self.bias is None else y + self.bias


class _FloatLinear(nn.Module):
    def __init__(self, weight: Dense, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float32(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _QuantizedEmbedding(nn.Module):
    """A table in the bytes of XNNPACK's matrix, so that a tied vocabulary can be stored once."""

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.bits = weight.bits
        self.register_buffer("codes", weight.codes() if weight.bits == 8 else xnnpack_nibbles(weight.packed))
        self.register_buffer(
            "scales", weight.scales.squeeze(1) if weight.bits == 8 else _halved(weight.scales)
        )

    def forward(self, ids: Tensor) -> Tensor:
        ops: Any = torch.ops.quantized_decomposed
        look_up = ops.embedding_byte if self.bits == 8 else ops.embedding_4bit
        low, high = (0, 0) if self.bits == 8 else CODE_RANGE[4]
        rows: Tensor = look_up.dtype(self.codes, self.scales, None, low, high, ids, dtype=torch.float32)
        # ``embedding_4bit`` takes the high nibble for the even column, XNNPACK the low one: each pair comes swapped.
        return rows if self.bits == 8 else rows.reshape(*rows.shape[:-1], -1, 2).flip(-1).reshape(rows.shape)


def _halved(scales: Tensor) -> Tensor:
    """Return float16, which scales on the grid are exact in unless they are beyond its range."""
    return scales.to(torch.float16) if scales.max() <= torch.finfo(torch.float16).max else scales


class _FloatEmbedding(nn.Module):
    def __init__(self, weight: Dense) -> None:
        super().__init__()
        kept = weight.load() if weight.dtype == torch.float16 else weight.float32()
        self.weight = nn.Parameter(kept, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(torch.float32)


class _CachedAttention(nn.Module):
    def __init__(self, shape: AttentionShape, position: Position) -> None:
        super().__init__()
        self.shape = shape
        self.position = position
        size = (1, shape.context, shape.kv_heads, shape.head_dim)
        self.k_cache: Tensor
        self.v_cache: Tensor
        self.register_buffer("k_cache", torch.zeros(size))
        self.register_buffer("v_cache", torch.zeros(size))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        start, llama = self.position.start, torch.ops.llama
        llama.update_cache(key.transpose(1, 2), self.k_cache, start)
        llama.update_cache(value.transpose(1, 2), self.v_cache, start)
        return self.attend(query)

    def attend(self, query: Tensor) -> Tensor:
        shape = self.shape
        # A window that no position can leave needs no mask.
        limited = shape.window is not None and shape.window < shape.context
        mask = self.position.mask(query.shape[2], shape.context, shape.window) if limited else None
        output: Tensor = torch.ops.llama.custom_sdpa(
            query.transpose(1, 2),
            self.k_cache,
            self.v_cache,
            self.position.start,
            mask,
            0.0,
            mask is None,
            shape.scaling,
        )
        return output


class _SoftcappedAttention(_CachedAttention):
    """Scores squashed by softcap * tanh(score / softcap) (Gemma 2), which ``custom_sdpa`` cannot do."""

    def attend(self, query: Tensor) -> Tensor:
        shape = self.shape
        assert shape.softcap is not None
        groups = query.shape[1] // shape.kv_heads
        keys = self.k_cache.transpose(1, 2).repeat_interleave(groups, dim=1)
        values = self.v_cache.transpose(1, 2).repeat_interleave(groups, dim=1)
        scores = query @ keys.transpose(2, 3) * shape.scaling
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
        scores = scores + self.position.mask(query.shape[2], shape.context, shape.window)
        return (scores.softmax(dim=-1) @ values).transpose(1, 2)


def register_whole_attention() -> str:
    """Register attention of an encoder with transformers; return its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_WHOLE, _attend_whole)
    AttentionMaskInterface.register(_WHOLE, eager_mask)
    return _WHOLE


def _attend_whole(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend to all tokens at once, batch 1: (1, heads, tokens, width) -> (1, tokens, heads, width).

    The products have three dimensions: of four, each operand would be copied, and the graph cut at every copy.
    """
    refuse_unknown(options)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.bmm(query, key.transpose(1, 2)) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores + attention_mask.flatten(0, 1)
    attended = torch.bmm(scores.softmax(dim=-1), value).transpose(0, 1)
    return attended.reshape(1, *attended.shape), None
