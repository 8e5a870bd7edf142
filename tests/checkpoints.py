"""Checkpoints made by hand, for tests of what is done to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint, Role
from slm_export.weights import Dense, Quantized, Weight


def dense(values: Tensor) -> Dense:
    return Dense(tuple(values.shape), values.dtype, lambda: values)


def checkpoint(
    weights: Mapping[str, Weight | Tensor],
    roles: Mapping[str, Role] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Return a checkpoint of these weights; without roles, every matrix is a linear layer."""
    made = {name: dense(value) if isinstance(value, Tensor) else value for name, value in weights.items()}
    guessed: dict[str, Role] = {
        name: "linear" if len(weight.shape) == 2 else "other" for name, weight in made.items()
    }
    return Checkpoint(
        folder=Path("model"),
        name="model",
        architecture="LlamaForCausalLM",
        task="text-generation",
        config=None,
        weights=made,
        roles={**guessed, **(roles or {})},
        tied=tied or {},
    )


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group_errors(values: Tensor, weight: Quantized) -> Tensor:
    """Return the squared error of each group, float64 (out, groups)."""
    difference = (values.double() - weight.float32().double()).square()
    return difference.view(values.shape[0], -1, weight.group).sum(-1)
