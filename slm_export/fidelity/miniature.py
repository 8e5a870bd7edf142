"""A miniature of a model: its first layers, narrow, of few tokens, in 32 bits.

It has every kind of layer that the model has, and the model's own numbers, as many as fit. What is built from it in
seconds is built by the same code as the model; and it rounds nothing, so that nothing can hide behind rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.compression.depth import stacks_of, with_layers
from slm_export.compression.geometry import mlps
from slm_export.errors import InputError
from slm_export.graph.layers import differences
from slm_export.source.load import architecture_of
from slm_export.weights import Dense, Weight

TOKENS = 512
NEURONS = 256
WINDOW = 24
_ASKING = "a miniature"


def miniature(checkpoint: Checkpoint) -> Checkpoint:
    """Return the first layers of a model, up to one of each kind, with the first tokens and neurons, in float32.

    A sliding window becomes one that a short text outgrows.
    """
    shorter = _first_layers(checkpoint)
    config = _config(shorter)
    cut = {**_neurons(shorter), **_tokens(shorter, config)}
    weights = {name: _dense(weight, cut.get(name, _Cut())) for name, weight in shorter.weights.items()}
    return replace(shorter, config=config, weights=weights, vocabulary=None)


@dataclass(frozen=True)
class _Cut:
    """The rows and columns of a weight that stay; None: all."""

    rows: Tensor | None = None
    columns: Tensor | None = None


def _first_layers(checkpoint: Checkpoint) -> Checkpoint:
    try:
        return with_layers(checkpoint, range(_depth(checkpoint)), _ASKING)
    except (
        InputError
    ):  # one layer, one that is used again and again (ALBERT), or lists that nobody knows how to cut
        return checkpoint


def _depth(checkpoint: Checkpoint) -> int:
    """Return how many layers from the first on have one of each kind.

    A prefix, because what a layer is may depend on its place.
    """
    _, stacks = stacks_of(checkpoint, _ASKING)
    module = architecture_of(checkpoint).empty_module()
    last = 0
    for stack in stacks:
        layers = cast(nn.ModuleList, module.get_submodule(stack))
        kinds: list[nn.Module] = []
        for index, layer in enumerate(layers):
            if all(differences(layer, kind) for kind in kinds):
                kinds.append(layer)
                last = max(last, index)
    return last + 1


def _config(checkpoint: Checkpoint) -> Any:
    """Return a configuration with fewer tokens, and a window that can be seen to work."""
    made = copy.deepcopy(checkpoint.config)
    text = made.get_text_config()
    text.vocab_size = min(text.vocab_size, TOKENS)
    if (text.pad_token_id or 0) >= text.vocab_size:
        text.pad_token_id = None
    if isinstance(window := getattr(text, "sliding_window", None), int):
        text.sliding_window = min(window, WINDOW)
    return made


def _neurons(checkpoint: Checkpoint) -> Mapping[str, _Cut]:
    """Return what stays of the matrices of each MLP; nothing where a family's are not known."""
    try:
        found = mlps(checkpoint, _ASKING)
    except InputError:
        return {}
    kept: dict[str, _Cut] = {}
    for parts in found:
        for name, rows in parts.rows.items():
            stay = rows[:NEURONS].t().flatten()
            kept[f"{name}.weight"] = kept[f"{name}.bias"] = _Cut(stay)
        kept[f"{parts.out}.weight"] = _Cut(columns=parts.columns[:NEURONS].flatten())
    return kept


def _tokens(checkpoint: Checkpoint, config: Any) -> Mapping[str, _Cut]:
    """Return what stays of the weights that the module itself makes shorter where there are fewer tokens."""
    before, after = (
        {name: tuple(value.shape) for name, value in architecture_of(made).empty_module().named_parameters()}
        for made in (checkpoint, replace(checkpoint, config=config))
    )
    rows = torch.arange(config.get_text_config().vocab_size)
    return {name: _Cut(rows) for name in checkpoint.weights if before.get(name) != after.get(name)}


def _dense(weight: Weight, cut: _Cut) -> Weight:
    values = weight.rows(torch.arange(weight.shape[0]) if cut.rows is None else cut.rows)
    if cut.columns is not None:
        values = values[:, cut.columns].contiguous()
    return Dense(tuple(values.shape), torch.float32, lambda: values)
