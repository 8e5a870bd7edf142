"""Norms and activations that compute something else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fault import Fault
from rope_faults import config
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.weights import Dense

NORM, ACTIVATION = "norm", "activation"


def vectors(change: Callable[[str, Tensor], Tensor | None]) -> Callable[[Checkpoint], Checkpoint]:
    """Return a plant: vectors that `change` returns something for are that."""

    def planted(checkpoint: Checkpoint) -> Checkpoint:
        changed = {}
        for name, weight in checkpoint.weights.items():
            if isinstance(weight, Dense) and len(weight.shape) == 1:
                values = change(name, weight.float32())
                if values is not None:
                    changed[name] = Dense(weight.shape, torch.float32, lambda values=values: values)  # type: ignore[misc]
        assert changed
        return checkpoint.with_weights(changed)

    return planted


def _ones(ending: str) -> Callable[[str, Tensor], Tensor | None]:
    return lambda name, values: torch.ones_like(values) if name.endswith(ending) else None


def _zeros(ending: str) -> Callable[[str, Tensor], Tensor | None]:
    return lambda name, values: torch.zeros_like(values) if name.endswith(ending) else None


def _exchanged(checkpoint: Checkpoint) -> Checkpoint:
    """The norm before attention and the one after it have each other's weights."""
    pair = ("input_layernorm", "post_attention_layernorm")
    changed = {}
    for name in checkpoint.weights:
        if f".{pair[0]}." in name:
            other = name.replace(*pair)
            changed |= {name: checkpoint.weights[other], other: checkpoint.weights[name]}
    assert changed
    return checkpoint.with_weights(changed)


FAULTS = (
    Fault("an epsilon of 0.01", NORM, written=config(rms_norm_eps=1e-2)),
    Fault("an epsilon ten times too large", NORM, written=config(rms_norm_eps=1e-4)),
    Fault(
        "the missing + 1", NORM, "gemma", written=vectors(lambda name, x: x - 1 if "norm" in name else None)
    ),
    Fault("a + 1 too many", NORM, written=vectors(lambda name, x: x + 1 if "norm" in name else None)),
    Fault("norms exchanged within layers", NORM, written=_exchanged),
    Fault("the last norm without its weight", NORM, written=vectors(_ones("model.norm.weight"))),
    Fault(
        "norms of the queries without their weight", NORM, "qwen 3", written=vectors(_ones("q_norm.weight"))
    ),
    Fault(
        "linear layers without their biases",
        "weights",
        "llama, biases",
        written=vectors(_zeros("v_proj.bias")),
    ),
    Fault("gelu for silu", ACTIVATION, written=config(hidden_act="gelu")),
    Fault("silu for gelu", ACTIVATION, "llama, gelu", written=config(hidden_act="silu")),
    Fault("gelu by erf for gelu by tanh", ACTIVATION, "llama, gelu", written=config(hidden_act="gelu")),
    Fault(
        "the sigmoid gelu for gelu by tanh",
        ACTIVATION,
        "llama, gelu",
        written=config(hidden_act="quick_gelu"),
    ),
    Fault("relu for silu", ACTIVATION, written=config(hidden_act="relu")),
)
