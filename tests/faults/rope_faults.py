"""Rotary embeddings that turn by other angles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from fault import Fault
from torch import Tensor

from slm_export.checkpoint import Checkpoint

KIND = "rotary embedding"
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def config(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    """Return a plant: the same weights, another configuration."""

    def planted(checkpoint: Checkpoint) -> Checkpoint:
        other = deepcopy(checkpoint.config)
        for name, value in changes.items():
            assert getattr(other, name) != value, name
            setattr(other, name, value)
        return replace(checkpoint, config=other)

    return planted


def rope(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    """Return a plant: some of the rotary parameters differ."""

    def planted(checkpoint: Checkpoint) -> Checkpoint:
        known = dict(checkpoint.config.rope_parameters)
        assert all(known[name] != value for name, value in changes.items())
        return config(rope_parameters={**known, **changes})(checkpoint)

    return planted


def _interleaved(x: Tensor) -> Tensor:
    """Turn neighbours, as GPT-J does, where halves are to be turned."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


@contextmanager
def rotating(rotate: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let Llama rotate in another way."""
    with patch("transformers.models.llama.modeling_llama.rotate_half", rotate):
        yield


def _backwards(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], -x[..., :half]), dim=-1)


def _swapped_factors(checkpoint: Checkpoint) -> Checkpoint:
    known = dict(checkpoint.config.rope_parameters)
    factors = {"short_factor": known["long_factor"], "long_factor": known["short_factor"]}
    return config(rope_parameters={**known, **factors})(checkpoint)


FAULTS = (
    Fault("another theta", KIND, written=rope(rope_theta=500000.0)),
    Fault("another factor of the scaling", KIND, "llama 3", written=rope(factor=8.0)),
    Fault("no scaling", KIND, "llama 3", written=config(rope_parameters=PLAIN)),
    Fault("scaled from another length", KIND, "llama 3", written=rope(original_max_position_embeddings=512)),
    Fault("all is rotated in place of a half", KIND, "phi 3", written=rope(partial_rotary_factor=1.0)),
    Fault("neighbours are rotated in place of halves", KIND, writing=lambda: rotating(_interleaved)),
    Fault("rotated backwards", KIND, writing=lambda: rotating(_backwards)),
    Fault("long and short factors exchanged", KIND, "phi 4", written=_swapped_factors),
    Fault("layers without rotation rotate", KIND, "smollm 3", written=config(no_rope_layers=[1] * 6)),
)
