"""A model with fewer layers: the same weights under new numbers, and a configuration that says so."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import nn

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.graph.layers import differences
from slm_export.source.load import architecture_of

_Value = TypeVar("_Value")


def stacks_of(checkpoint: Checkpoint, asking: str) -> tuple[int, tuple[str, ...]]:
    """Return how many layers there are, and the prefixes of the lists that they are numbered in.

    Most families have one list, model.layers; FlauBERT has four side by side.

    Raises:
        InputError: the layers have no weights of their own, or none are numbered.
    """
    count = int(checkpoint.config.get_text_config().num_hidden_layers)
    numbered: dict[str, set[int]] = {}
    for name in checkpoint.weights:
        if match := re.fullmatch(r"(.+?)\.(\d+)\..+", name):
            numbered.setdefault(match[1], set()).add(int(match[2]))
    stacks = tuple(prefix for prefix, indices in numbered.items() if indices == set(range(count)))
    if not stacks or count < 2:
        own = max(map(len, numbered.values()), default=0)
        raise InputError(
            f"{asking}: {checkpoint.name} has {count} layers, {own} with weights of their own: there is none to take "
            "away; leave the pass out"
        )
    return count, stacks


def with_layers(checkpoint: Checkpoint, kept: Sequence[int], asking: str) -> Checkpoint:
    """Return the model with these of its layers alone, in their order.

    Raises:
        InputError: the configuration lists what is not one thing per layer.
    """
    count, stacks = stacks_of(checkpoint, asking)
    renamed = {name: _renamed(name, kept, stacks) for name in (*checkpoint.weights, *checkpoint.tied)}
    return replace(
        checkpoint,
        config=_shortened(checkpoint.config, kept, count, asking),
        weights=_under(checkpoint.weights, renamed),
        roles=_under(checkpoint.roles, renamed),
        tied=_under(checkpoint.tied, renamed),
        transposed=frozenset(new for name in checkpoint.transposed if (new := renamed[name]) is not None),
    )


def refuse_changed(before: Checkpoint, after: Checkpoint, kept: Sequence[int], asking: str) -> None:
    """Raise InputError where a layer that stayed became another, because its place says something about it."""
    whole, shorter = (architecture_of(each).empty_module() for each in (before, after))
    for stack in stacks_of(before, asking)[1]:
        old, new = (cast(nn.ModuleList, module.get_submodule(stack)) for module in (whole, shorter))
        for index, layer in enumerate(kept):
            if differing := differences(old[layer], new[index]):
                raise InputError(
                    f"{asking}: layer {layer} of {before.name} would become another ({differing[0]}) with fewer "
                    "layers before it; leave the pass out"
                )


def _renamed(name: str, kept: Sequence[int], stacks: Sequence[str]) -> str | None:
    """Return the new name; None for what belongs to a layer that goes."""
    for stack in stacks:
        if match := re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.+)", name):
            index = int(match[1])
            return f"{stack}.{kept.index(index)}.{match[2]}" if index in kept else None
    return name


def _under(values: Mapping[str, _Value], renamed: Mapping[str, str | None]) -> dict[str, _Value]:
    return {new: value for name, value in values.items() if (new := renamed[name]) is not None}


def _shortened(config: Any, kept: Sequence[int], count: int, asking: str) -> Any:
    """Return a copy of a configuration for these layers, with what it lists by layer."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for key, value in list(vars(text).items()):
        if "layer" not in key or not isinstance(value, list | tuple) or not value:
            continue
        if len(value) != count:
            raise InputError(
                f"{asking}: {key} of {config.model_type} lists {len(value)} where there are {count} layers, and what "
                "that means with fewer is not known; leave the pass out"
            )
        setattr(text, key, [value[index] for index in kept])
    text.num_hidden_layers = len(kept)
    return made
