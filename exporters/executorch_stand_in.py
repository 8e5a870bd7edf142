"""Stand-ins for the weights of two layers, and the constants that XNNPACK makes of weights.

stand_in    random weights in layers 0 and 1, no two alike, so that each can be told from what was made of it
keys_of        the names that XNNPACK gives to the constants that it makes of a weight
constant       one of them, as it is stored
constants_of   all of them, under their names
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.graph.layers import Layers, hollow_weight
from slm_export.weights import SMALLEST_SCALE, Dense, Quantized, Weight, grid_scale


def stand_in(checkpoint: Checkpoint, layers: Layers) -> Checkpoint:
    """Return the checkpoint with random weights in layers 0 and 1, and no matrix in later ones."""
    generator = torch.Generator().manual_seed(0)
    changed: dict[str, Weight] = {}
    for index in range(layers.count):
        for rest in layers.rests:
            name = f"{layers.prefix}.{index}.{rest}"
            weight = checkpoint.weights[name]
            changed[name] = _random(weight, generator) if index < 2 else hollow_weight(weight)
    return checkpoint.with_weights(changed)


def keys_of(weight: Weight) -> tuple[str, ...]:
    """Return the names of the constants that XNNPACK makes of a weight: of codes two, which tell the weight."""
    return tuple(
        prefix + hashlib.sha256(data.numpy().data).hexdigest() for prefix, data in _constants(weight)
    )


def constant(weight: Weight, index: int) -> bytes:
    """Return the bytes of one of them."""
    _, data = list(_constants(weight))[index]
    return data.numpy().tobytes()


def constants_of(weight: Weight) -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes of them."""
    for index, key in enumerate(keys_of(weight)):
        yield key, constant(weight, index)


def xnnpack_nibbles(packed: Tensor) -> Tensor:
    """Return uint8 (rows, in / 2) of int4 codes: code + 8, even column in the low nibble. Its own inverse."""
    return packed ^ 0x88  # two's complement -> offset: the sign bit of each nibble flipped


def _constants(weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """Yield what a name begins with, and the bytes as uint8."""
    if isinstance(weight, Dense):
        half = len(weight.shape) > 1 and weight.dtype == torch.float16
        yield "", _bytes(weight.load() if half else weight.float32())
        return
    packed, scales = weight.load()
    yield "", _bytes(packed if weight.bits == 8 else xnnpack_nibbles(packed))
    yield "scale_", _bytes(scales if weight.bits == 8 else scales.to(torch.bfloat16))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _random(weight: Weight, generator: torch.Generator) -> Weight:
    if isinstance(weight, Dense):
        values = torch.rand(weight.shape, generator=generator).to(weight.dtype)
        return Dense(weight.shape, weight.dtype, lambda: values)
    low, high = (-127, 128) if weight.bits == 8 else (0, 256)
    rows, columns = weight.shape
    kind = torch.int8 if weight.bits == 8 else torch.uint8
    packed = torch.empty(rows, columns * weight.bits // 8, dtype=kind).random_(low, high, generator=generator)
    scales = torch.rand(rows, columns // weight.group, generator=generator) + SMALLEST_SCALE
    return Quantized.of(weight.shape, weight.bits, packed, grid_scale(scales))
