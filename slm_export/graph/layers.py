"""Which layers of a decoder are copies of each other.

A compiler's passes take seconds per layer. Where all layers are alike it is given two, and the program of all is
put together from what comes out.

    layers_of     the layers, where all have weights of the same names, shapes and bits
    check_alike   whether the modules of all layers have the same settings
    differences   what two layers differ in
    keep_kinds    a model with one layer of every kind: enough to see which operators it is made of
    hollow        a checkpoint whose matrices take no memory: what is left tells settings, vectors and caches
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from slm_export.checkpoint import Checkpoint
from slm_export.weights import Dense, Weight

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


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the parts in which two layers, of two models, have other settings.

    Compared are numbers, words and forms of tensors; functions and configurations are each model's own.
    """
    before, after = (
        {
            path: (kind, {name: value for name, value in named.items() if isinstance(value, _PLAIN)}, *forms)
            for path, (kind, named, *forms) in _settings(layer).items()
        }
        for layer in (one, other)
    )
    return sorted(
        path or "itself" for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )


def keep_kinds(model: nn.Module) -> list[int]:
    """Leave of a model's layers the first of every kind; return which those are.

    Lists that a model goes through side by side (FlauBERT's attentions and norms) are left as they are.
    """
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    path = max(lists, key=lambda path: len(lists[path]), default="")
    beside = [other for other in lists if other.rpartition(".")[0] == path.rpartition(".")[0]]
    if len(beside) != 1:
        return []
    kinds: list[dict[str, Any]] = []
    kept = []
    for index, layer in enumerate(lists[path]):
        if (settings := _settings(layer)) not in kinds:
            kinds.append(settings)
            kept.append(index)
    model.set_submodule(path, nn.ModuleList(lists[path][index] for index in kept))
    return kept


def hollow(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without its matrices."""
    return checkpoint.with_weights(
        {name: hollow_weight(weight) for name, weight in checkpoint.weights.items()}
    )


def _kind(weight: Weight) -> tuple[Any, ...]:
    if isinstance(weight, Dense):
        return weight.shape, weight.dtype
    return weight.shape, weight.bits, weight.group, type(weight)


def hollow_weight(weight: Weight) -> Weight:
    """Return a weight of the same shape whose values take no memory, if it is a matrix."""
    if len(weight.shape) < 2:
        return weight
    zero = torch.zeros(()).expand(weight.shape)
    return Dense(weight.shape, torch.float32, lambda: zero)


_SMALL = 1 << 16  # caches are larger, and empty
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_PLAIN = (int, float, str, tuple, list, type(None))
_WHICH = frozenset({"layer_idx", "layer_id", "name", "keys", "index"})
"""Attributes of layers and of dialects' parts that say which layer they are of, and so differ between copies."""


def _settings(layer: nn.Module) -> dict[str, Any]:
    """Return class, attributes and forms of the tensors of every part. What cannot be compared is different."""
    return {
        path: (
            type(part),
            {k: v for k, v in vars(part).items() if k not in _OF_EVERY_MODULE and k not in _WHICH},
            {k: (v.shape, v.dtype) for k, v in part.state_dict().items()},
            {k: v.numpy().tobytes() for k, v in part.named_buffers(recurse=False) if v.numel() < _SMALL},
        )
        for path, part in layer.named_modules()
    }
