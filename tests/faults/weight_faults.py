"""Matrices that are not those of the checkpoint, and grids that are read in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fault import Fault
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.weights import Quantized, grid_scale, pack_int4, quantized

KIND, GRID = "weights", "quantization"

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Codes int8 (out, in) and scales float32 (out, groups), changed."""


def changed(part: str, change: Change) -> Callable[[Checkpoint], Checkpoint]:
    """Return a plant: codes and scales of every matrix whose name ends so."""

    def planted(checkpoint: Checkpoint) -> Checkpoint:
        found = {}
        for name, weight in checkpoint.weights.items():
            if name.endswith(part) and isinstance(weight, Quantized):
                codes, scales = change(weight.codes().clone(), weight.scales.clone())
                packed = pack_int4(codes) if weight.bits == 4 else codes
                found[name] = Quantized.of(weight.shape, weight.bits, packed, scales)
        assert found, part
        return checkpoint.with_weights(found)

    return planted


def renamed(one: str, other: str) -> Callable[[Checkpoint], Checkpoint]:
    """Return a plant: matrices of two names are exchanged."""

    def planted(checkpoint: Checkpoint) -> Checkpoint:
        found = {}
        for name in checkpoint.weights:
            if one in name:
                twin = name.replace(one, other)
                found |= {name: checkpoint.weights[twin], twin: checkpoint.weights[name]}
        assert found
        return checkpoint.with_weights(found)

    return planted


def _one(name: str) -> str:
    return f"layers.1.{name}.weight"


def _transposed(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes.T.contiguous(), scales


def _shifted_scales(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes, scales.roll(1, 0)


def _nibbles(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes.unflatten(1, (-1, 2)).flip(-1).flatten(1), scales


def _zero_group(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    codes[:, :32] = 0
    return codes, scales


def _zero_one_group(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    codes[5, :32] = 0
    return codes, scales


def _unsigned(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0..15 read with a zero point of 7."""
    return (codes + 1).clamp(-8, 7), scales


def _per_channel(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for the row, written as many."""
    return codes, scales[:, :1].expand_as(scales).contiguous()


def _clipped(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes, grid_scale(scales.clamp(max=float(scales.median())))


def _next_group(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return codes, scales.roll(1, 1)


def _large_scale(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    scales[3] = grid_scale(scales[3] * 2)
    return codes, scales


def _stale_head(checkpoint: Checkpoint) -> Checkpoint:
    """A head of its own, from before the embedding was trained on: where the two were one."""
    (head, shared), *_ = checkpoint.tied.items()
    weight = checkpoint.weights[shared]
    assert isinstance(weight, Quantized)
    old = quantized(weight.codes().roll(1, 0), weight.scales.roll(1, 0), weight.bits)
    tied = {name: to for name, to in checkpoint.tied.items() if name != head}
    roles = {**checkpoint.roles, head: "head"}
    return replace(checkpoint, weights={**checkpoint.weights, head: old}, roles=roles, tied=tied)  # type: ignore[arg-type]


_EVERY = (
    ("two layers exchanged", KIND, 8, renamed("layers.1.", "layers.2.")),
    ("gate and up exchanged", KIND, 8, renamed("gate_proj", "up_proj")),
    ("a square matrix transposed", KIND, 8, changed(_one("self_attn.q_proj"), _transposed)),
    ("scales one row late", KIND, 8, changed(_one("mlp.down_proj"), _shifted_scales)),
    ("nibbles exchanged", GRID, 4, changed(_one("mlp.down_proj"), _nibbles)),
    ("the first group of every row zero", GRID, 4, changed(_one("mlp.down_proj"), _zero_group)),
    ("a zero point that is not the grid's", GRID, 4, changed(_one("mlp.up_proj"), _unsigned)),
    ("per-channel scales as per-group ones", GRID, 4, changed("proj.weight", _per_channel)),
    ("large scales clipped", GRID, 4, changed("proj.weight", _clipped)),
    ("scales of the next group", GRID, 4, changed(_one("mlp.down_proj"), _next_group)),
    ("one row of twice its size", GRID, 8, changed(_one("mlp.down_proj"), _large_scale)),
    ("one group of one row zero", GRID, 4, changed(_one("mlp.down_proj"), _zero_one_group)),
)

FAULTS = (
    *(
        Fault(f"{name}, by the exporter", kind, bits=bits, written=plant)
        for name, kind, bits, plant in _EVERY
    ),
    *(Fault(f"{name}, by a pass", kind, "llama", bits, made=plant) for name, kind, bits, plant in _EVERY),
    Fault("a stale head after tying", KIND, written=_stale_head),
)
