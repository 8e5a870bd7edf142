"""Which layers of a decoder are copies of each other, and stand-ins for their weights.

layers_of   the layers, where all have weights of the same names, shapes and bits
stand_in    random weights in layers 0 and 1, no two alike, so that each can be told from what was made of it
hollow      no matrix takes memory: what is left tells the settings, vectors and caches of every layer
constants_of   a weight as XNNPACK stores it, under the names that it gives
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.weights import SMALLEST_SCALE, Dense, Quantized, Weight, grid_scale

_LAYER = re.compile(r"(?P<prefix>.+?)\.(?P<index>\d+)\.(?P<rest>.+)")


class CannotStamp(Exception):
    """The layers are not copies of each other, or the lowered graph is not cut as expected; says why."""


@dataclass(frozen=True)
class Layers:
    """The numbered layers of a decoder, all alike."""

    prefix: str
    """model.layers, in the names of the checkpoint."""
    count: int
    rests: tuple[str, ...]
    """What comes after the index, for every weight of a layer."""

    @property
    def path(self) -> str:
        """The stack in the module that `build_decoder` makes."""
        return f"model.{self.prefix}"

    def split(self, name: str | None) -> tuple[int, str] | None:
        """Return index and rest of a name in the module, or None for what is in no layer."""
        match = _LAYER.fullmatch(name or "")
        return (int(match["index"]), match["rest"]) if match and match["prefix"] == self.path else None

    def weight(self, checkpoint: Checkpoint, index: int, rest: str) -> Weight:
        """Return a weight of a layer."""
        return checkpoint.weights[f"{self.prefix}.{index}.{rest}"]


def layers_of(checkpoint: Checkpoint) -> Layers:
    """Return the layers; CannotStamp unless there are three or more, with weights alike."""
    kinds: dict[str, dict[int, dict[str, tuple[Any, ...]]]] = {}
    for name, weight in checkpoint.weights.items():
        if match := _LAYER.fullmatch(name):
            layer = kinds.setdefault(match["prefix"], {}).setdefault(int(match["index"]), {})
            layer[match["rest"]] = _kind(weight)
    prefix = max(kinds, key=lambda prefix: len(kinds[prefix]), default="")
    layers = kinds.get(prefix, {})
    if sorted(layers) != list(range(len(layers))) or len(layers) < 3:
        raise CannotStamp(f"{len(layers)} numbered layers")
    for index, layer in layers.items():
        if layer != layers[0]:
            raise CannotStamp(f"layer {index} has other weights than layer 0")
    return Layers(prefix, len(layers), tuple(layers[0]))


def check_alike(module: nn.Module, layers: Layers) -> None:
    """Raise CannotStamp unless all layers are modules of the same classes, with the same settings."""
    stack = cast(nn.ModuleList, module.get_submodule(layers.path))
    if not isinstance(stack, nn.ModuleList) or len(stack) != layers.count:
        raise CannotStamp(f"{layers.path} is no list of {layers.count} layers")
    first = _settings(stack[0])
    for index, layer in enumerate(stack):
        if (settings := _settings(layer)) != first:
            differing = [path for path in first if settings.get(path) != first[path]]
            raise CannotStamp(f"layer {index} differs from layer 0 in {differing[:3]}")


def stand_in(checkpoint: Checkpoint, layers: Layers) -> Checkpoint:
    """Return the checkpoint with random weights in layers 0 and 1, and no matrix in later ones."""
    generator = torch.Generator().manual_seed(0)
    changed: dict[str, Weight] = {}
    for index in range(layers.count):
        for rest in layers.rests:
            name = f"{layers.prefix}.{index}.{rest}"
            weight = checkpoint.weights[name]
            changed[name] = _random(weight, generator) if index < 2 else _hollow(weight)
    return checkpoint.with_weights(changed)


def hollow(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without its matrices."""
    return checkpoint.with_weights({name: _hollow(weight) for name, weight in checkpoint.weights.items()})


def constants_of(weight: Weight) -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes of the constants that XNNPACK makes of a weight."""
    if isinstance(weight, Dense):
        half = len(weight.shape) > 1 and weight.dtype == torch.float16
        yield _named("", weight.load() if half else weight.float32())
        return
    yield _named("", weight.packed if weight.bits == 8 else xnnpack_nibbles(weight))
    yield _named("scale_", weight.scales if weight.bits == 8 else weight.scales.to(torch.bfloat16))


def xnnpack_nibbles(weight: Quantized) -> Tensor:
    """Return uint8 (rows, in / 2) of int4 codes: code + 8, even column in the low nibble."""
    return weight.packed ^ 0x88  # two's complement -> offset: the sign bit of each nibble flipped


def _named(prefix: str, tensor: Tensor) -> tuple[str, bytes]:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return prefix + hashlib.sha256(data).hexdigest(), data


def _kind(weight: Weight) -> tuple[Any, ...]:
    if isinstance(weight, Quantized):
        return weight.shape, weight.bits, weight.group
    return weight.shape, weight.dtype


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


def _hollow(weight: Weight) -> Weight:
    if len(weight.shape) < 2:
        return weight
    zero = torch.zeros(()).expand(weight.shape)
    return Dense(weight.shape, torch.float32, lambda: zero)


_SMALL = 1 << 16  # caches are larger, and empty
_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _settings(layer: nn.Module) -> dict[str, Any]:
    """Return class, attributes and forms of the tensors of every part. What cannot be compared is different."""
    return {
        path: (
            type(part),
            {k: v for k, v in vars(part).items() if k not in _OF_EVERY_MODULE and k != "layer_idx"},
            {k: (v.shape, v.dtype) for k, v in part.state_dict().items()},
            {k: v.numpy().tobytes() for k, v in part.named_buffers(recurse=False) if v.numel() < _SMALL},
        )
        for path, part in layer.named_modules()
    }
