"""The parts of a model in the operators that ONNX Runtime has its best kernels for.

int4        ``MatMulNBits`` at accuracy level 4, which quantizes activations to int8 block by block, and
            ``GatherBlockQuantized`` over the very same bytes
int8        ``MatMulIntegerToFloat`` on activations quantized to uint8 per token. It knows one zero point for all
            rows; what each row's own adds is its distance times the sums of the matrix's columns.
floats      ``Gemm`` and ``Gather``; float16 is stored as such and computed in float32
attention   ``GroupQueryAttention``, whose past and present may be one buffer

A matrix is no part of the graph while it is traced: what stands in for it has a shape and no memory
(`onnx_stored`).

Why int8 is not ``MatMulNBits`` too: on a prompt it takes twice as long. Why activations are unsigned: with signed
ones MLAS falls back to a plain loop on x86, 50 times slower.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.onnx_places import Place
from slm_export.exporters.onnx_stored import CODES, COLUMNS, SCALES, SUMS, Stored
from slm_export.graph.dialect import AttentionShape, Position, fake_quantize_per_token
from slm_export.weights import Dense, Quantized, Weight, on_grid

_CONTRIB = "com.microsoft"
_INT8_ACTIVATIONS = 4  # an accuracy level of MatMulNBits
_ZERO = 128
"""The zero point that the product is told."""
_LEAST = 1e-30
"""A row of zeros has a scale too."""


def onnxruntime_rounding(x: Tensor, weight: Weight) -> Tensor:
    """Return activations as ONNX Runtime's kernels round them: int8 per token for int8 codes, per group for int4.

    MLAS rounds a tie to even on x86 and away from zero on Arm.
    """
    if not isinstance(weight, Quantized):
        return x
    if weight.bits == 8:
        return fake_quantize_per_token(x)
    blocks = x.reshape(*x.shape[:-1], -1, weight.group)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(_LEAST) / 127
    return ((blocks / scale).round() * scale).reshape(x.shape)


class Call:
    """What the parts of a model share while one call is traced: caches, and activations quantized once."""

    def __init__(self) -> None:
        self.past: Sequence[Tensor] = ()
        """Keys and values of every layer in turn; each layer leaves what they become in ``present``."""
        self.present: list[Tensor] = []
        self.lengths: tuple[Tensor, Tensor] = (torch.zeros(1), torch.zeros(()))
        """Positions before the last, int32 (1,), and all positions, int32 scalar."""
        self._quantized: tuple[Tensor | None, tuple[Tensor, ...]] = (None, ())

    def begin(self, past: Sequence[Tensor], mask: Tensor) -> None:
        """Start a call: keys and values of every layer in turn; mask int64 (1, past and new tokens)."""
        seen = mask.sum(dim=1) - 1
        total = torch.onnx.ops.symbolic("Shape", (mask,), {"start": 1}, dtype=torch.int64, shape=(1,))
        self.past, self.present = past, []
        self.lengths = (seen.to(torch.int32), total.to(torch.int32).reshape(()))

    def quantized(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return uint8 codes of the rows of x, the step of each, and what to add of the sums, float32 (rows, 1).

        Queries, keys and values come from the same activations, one after the other.
        """
        if self._quantized[0] is not x:
            self._quantized = (x, _per_token(x))
        return self._quantized[1]


class OnnxDialect:
    """Makes parts for ONNX Runtime. ``stored`` and ``layers`` tell afterwards what was made."""

    def __init__(self, checkpoint: Checkpoint, places: Collection[str] = ()) -> None:
        """``places``: names of weights that adapters may add to."""
        self._names = {id(weight): name for name, weight in checkpoint.weights.items()}
        self._places = frozenset(places)
        self._shared = frozenset(checkpoint.tied.values())
        self.stored: dict[str, Stored] = {}
        self.layers: list[AttentionShape] = []
        self.call = Call()

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return a linear layer on the codes themselves, or on float32 or float16 values."""
        weight = on_grid(weight)
        stored = self._stored(weight, by_column=True)
        part: nn.Module
        if isinstance(weight, Dense):
            part = _FloatLinear(stored, bias)
        elif weight.bits == 4:
            part = _Int4Linear(stored, weight, bias)
        else:
            part = _Int8Linear(stored, bias, self.call)
        return Place(part, stored.name, weight.shape) if stored.name in self._places else part

    def embedding(self, weight: Weight) -> nn.Module:
        """Return a table look-up."""
        weight = on_grid(weight)
        # A table that is a head too lies as the head needs it.
        stored = self._stored(weight, by_column=self._names[id(weight)] in self._shared)
        if isinstance(weight, Dense):
            return _FloatEmbedding(stored)
        return (_Int4Embedding if weight.bits == 4 else _Int8Embedding)(stored, weight)

    def cached_attention(self, shape: AttentionShape, position: Position) -> nn.Module:
        """Return attention over a past that the graph takes as an input."""
        if shape.head_dim % 8:
            raise InputError(
                f"attention heads of width {shape.head_dim} cannot be exported to onnx: GroupQueryAttention takes "
                "multiples of 8"
            )
        self.layers.append(shape)
        return _CachedAttention(shape, self.call, len(self.layers) - 1)

    def names_in(self, model: nn.Module) -> Mapping[str, str]:
        """Return the initializers of a traced model: what the tracer calls them -> their names in the file."""
        names = {}
        for path, child in model.named_modules():
            for key in getattr(child, "keys", ()):
                names[f"{path}.{key}"] = child.keys[key]
        return names

    def _stored(self, weight: Weight, by_column: bool) -> Stored:
        name = self._names[id(weight)]
        if name not in self.stored:
            self.stored[name] = Stored(name, weight, by_column)
        return self.stored[name]


class _Part(nn.Module):
    """Holds stand-ins as buffers; ``keys`` says what each is in the file."""

    def __init__(self, stored: Stored, suffixes: Mapping[str, str], bias: Tensor | None = None) -> None:
        super().__init__()
        self.keys: dict[str, str] = {}
        for key, suffix in suffixes.items():
            self.register_buffer(key, stored[suffix])
            self.keys[key] = stored.name + suffix
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class _FloatLinear(_Part):
    weight: Tensor

    def __init__(self, stored: Stored, bias: Tensor | None) -> None:
        super().__init__(stored, {"weight": ""}, bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inputs = [rows, self.weight.to(torch.float32)] + ([] if self.bias is None else [self.bias])
        shape = (rows.shape[0], self.weight.shape[0])
        made = torch.onnx.ops.symbolic("Gemm", inputs, {"transB": 1}, dtype=torch.float32, shape=shape)
        return made.reshape(*x.shape[:-1], shape[1])


class _Int4Linear(_Part):
    codes: Tensor
    scales: Tensor

    def __init__(self, stored: Stored, weight: Quantized, bias: Tensor | None) -> None:
        super().__init__(stored, {"codes": CODES, "scales": SCALES}, bias)
        rows, columns = weight.shape
        self.options: dict[str, Any] = {"K": columns, "N": rows, "bits": 4, "block_size": weight.group}

    def forward(self, x: Tensor) -> Tensor:
        inputs: list[Tensor | None] = [x, self.codes, self.scales]
        if self.bias is not None:
            inputs += [None, None, self.bias]
        options = {**self.options, "accuracy_level": _INT8_ACTIVATIONS}
        shape = (*x.shape[:-1], self.options["N"])
        return torch.onnx.ops.symbolic(
            f"{_CONTRIB}::MatMulNBits", inputs, options, dtype=torch.float32, shape=shape, version=1
        )


class _Int8Linear(_Part):
    columns: Tensor
    scales: Tensor
    sums: Tensor

    def __init__(self, stored: Stored, bias: Tensor | None, call: Call) -> None:
        super().__init__(stored, {"columns": COLUMNS, "scales": SCALES, "sums": SUMS}, bias)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        codes, steps, distance = self.call.quantized(x)
        one, zero = torch.ones(()), torch.full((), _ZERO, dtype=torch.uint8)
        shape = (codes.shape[0], self.columns.shape[1])
        made = torch.onnx.ops.symbolic(
            f"{_CONTRIB}::MatMulIntegerToFloat",
            (codes, self.columns, one, self.scales, zero),
            dtype=torch.float32,
            shape=shape,
            version=1,
        )
        made = made * steps + distance * self.sums
        return (made if self.bias is None else made + self.bias).reshape(*x.shape[:-1], shape[1])


def _per_token(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of the rows of x, the step of each, and what its own zero point adds, float32 (rows, 1)."""
    rows = x.reshape(-1, x.shape[-1])
    low, high = rows.amin(-1, keepdim=True).clamp_max(0), rows.amax(-1, keepdim=True).clamp_min(0)
    steps = (high - low).clamp_min(_LEAST) / 255
    zeros = (-low / steps).round()
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (rows, steps.squeeze(1), zeros.squeeze(1).to(torch.uint8)),
        {"axis": 0},
        dtype=torch.uint8,
        shape=rows.shape,
    )
    return codes, steps, (_ZERO - zeros) * steps


class _FloatEmbedding(_Part):
    weight: Tensor

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored, {"weight": ""})

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(torch.float32)


class _Int4Embedding(_Part):
    codes: Tensor
    scales: Tensor

    def __init__(self, stored: Stored, weight: Quantized) -> None:
        super().__init__(stored, {"codes": CODES, "scales": SCALES})
        self.group, self.columns = weight.group, weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        # Three dimensions, as MatMulNBits has its codes: a head may be the same initializer.
        groups = self.columns // self.group
        made = torch.onnx.ops.symbolic(
            f"{_CONTRIB}::GatherBlockQuantized",
            (self.codes, ids, self.scales.unsqueeze(2)),
            {"bits": 4, "block_size": self.group, "gather_axis": 0, "quantize_axis": 2},
            dtype=torch.float32,
            shape=(*ids.shape, groups, self.group),
            version=1,
        )
        return made.reshape(*ids.shape, self.columns)


class _Int8Embedding(_Part):
    scales: Tensor

    def __init__(self, stored: Stored, weight: Quantized) -> None:
        codes = COLUMNS if stored.by_column else CODES
        super().__init__(stored, {"codes": codes, "scales": SCALES})
        self.by_column = stored.by_column

    def forward(self, ids: Tensor) -> Tensor:
        codes: Any = self.codes
        flat = ids.reshape(-1)
        rows = codes.index_select(1, flat).t() if self.by_column else codes.index_select(0, flat)
        values: Tensor = rows.to(torch.float32) * self.scales.index_select(0, flat).unsqueeze(1)
        return values.reshape(*ids.shape, values.shape[1])


class _CachedAttention(nn.Module):
    def __init__(self, shape: AttentionShape, call: Call, index: int) -> None:
        super().__init__()
        self.shape, self.call, self.index = shape, call, index

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape, call = self.shape, self.call
        if value.shape[3] != shape.head_dim:
            raise InputError("attention whose keys and values differ in width cannot be exported to onnx")
        heads, tokens = query.shape[1], query.shape[2]
        attributes: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": shape.kv_heads,
            "scale": shape.scaling,
            "local_window_size": -1 if shape.window is None else shape.window,
            "softcap": shape.softcap or 0.0,
        }
        past = call.past[2 * self.index : 2 * self.index + 2]
        flat = [x.transpose(1, 2).reshape(1, tokens, -1) for x in (query, key, value)]
        after = (1, shape.kv_heads, past[0].shape[2] + tokens, shape.head_dim)
        output, *present = torch.onnx.ops.symbolic_multi_out(
            f"{_CONTRIB}::GroupQueryAttention",
            (*flat, *past, *call.lengths),
            attributes,
            dtypes=(torch.float32,) * 3,
            shapes=(flat[0].shape, after, after),
            version=1,
        )
        call.present += present
        attended: Tensor = output.reshape(1, tokens, heads, shape.head_dim)
        return attended
