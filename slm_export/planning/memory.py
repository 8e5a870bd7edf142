"""What a process holds at its peak while a model runs: weights as the runtime packs them, KV cache, activations.

The share of the file that runtimes hold beside it was measured on the host (see `formats`), not on phones.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from slm_export.planning.formats import FORMATS
from slm_export.planning.model import ModelShape

KV_VALUE = {"executorch": 4, "litert": 4, "onnx": 4, "coreml": 2}
"""Bytes of a value in the KV cache, as each format declares it."""
KV_PRECISIONS = {"float32": 4, "float16": 2, "int8": 1}
PREFILL_CHUNK = 512
"""Most tokens of one call."""
_MIB = 1 << 20
_MOST_TOKENS = 1 << 20
_ACTIVATION = 4  # bytes: activations are float32, and quantized only on their way into a kernel


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at its peak."""

    weights: int
    kv_cache: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """Of the process, beside what the app itself holds."""
        return self.weights + self.kv_cache + self.activations + self.runtime


def memory_of(model: ModelShape, file_bytes: int, context: int, format: str) -> Memory:
    """Return what a model takes with room for so many tokens."""
    known = FORMATS[format]
    return Memory(
        weights=round(known.memory * file_bytes),
        kv_cache=kv_bytes(model, context, KV_VALUE[format]),
        activations=_activations(model, min(context, PREFILL_CHUNK)),
        runtime=round(known.runtime_mb * _MIB),
    )


def kv_bytes(model: ModelShape, context: int, value_bytes: int) -> int:
    """Return the KV cache of a context in one precision; windows are counted as whole contexts, as they are stored."""
    return model.kv_values * context * value_bytes


def longest_context(model: ModelShape, file_bytes: int, format: str, limit: int) -> int | None:
    """Return the most tokens that fit into a limit of bytes; 0 if none do, None for a model without a cache."""
    if not model.kv_values:
        return None
    lengths = range(1, (model.positions or _MOST_TOKENS) + 1)
    return bisect_right(lengths, limit, key=lambda tokens: memory_of(model, file_bytes, tokens, format).total)


def _activations(model: ModelShape, tokens: int) -> int:
    """Return the buffers of a layer that live together: the two widest ones, and four as wide as the residual."""
    return _ACTIVATION * tokens * (2 * model.widest + 4 * model.hidden)
