"""Quantize matrices to signed integers, with the scale of least squared error.

Given   Dense matrices: linear layers (out, in), embedding tables and heads (vocabulary, in)
Result  4 bits: codes -8..7, one scale per ``group`` columns; 8 bits: codes -127..127, one scale per row;
        16 bits: Dense float16; 32 bits: untouched, and listed as skipped

The scale is searched for, because the largest value of a group is a poor guide to it: clipping one
outlier by half a step costs less than coarsening all of the group. For every group, a range of clipping
points is tried, each with the scale that is best for the codes it gives: with codes q fixed the best scale is
<w, q> / <q, q>, and leaves an error of <w, w> - <w, q>^2 / <q, q>. The best of all is refined in the same way
(Lloyd's algorithm for a uniform quantizer). No data is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slm_export.bundles.finished import Keeper
from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.precision import BITS, ByName, chosen, refuse_names, refuse_values
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError
from slm_export.weights import (
    CODE_RANGE,
    GROUPS,
    SMALLEST_SCALE,
    Dense,
    Quantized,
    Weight,
    grid_scale,
    quantized,
)

Bits = Literal[4, 8, 16, 32]

# The largest magnitude is mapped to these codes: from a little beyond the range (which clips it) to inside.
_CLIPS = {
    4: (10.0, 9.3, 8.7, 8.2, 7.8, 7.4, 7.0, 6.7, 6.4, 6.0),
    8: (135.0, 131.0, 129.0, 127.0),
}
_REFINEMENTS = 1
_BLOCK = (
    1 << 18
)  # values at a time: the few float32 copies that the search needs stay in the processor's cache


@dataclass(frozen=True)
class GroupQuantize:
    """Options: bits of linear layers, group of 4-bit matrices, bits of embedding and head, scale search.

    The tables (see `precision`) say otherwise for single matrices, by their names.
    """

    name: ClassVar[str] = "group-quantize"
    calibrated: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True
    structural: ClassVar[bool] = False

    bits: Bits = 4
    group: int = 32
    embedding_bits: Bits = 8
    head_bits: Bits | None = None
    """None: as the embedding. A tied pair is one matrix, and takes ``embedding_bits``."""
    search: bool = True
    """False takes the largest magnitude of each group for its range (min-max): for comparison."""
    bits_by_tensor: ByName = field(default_factory=dict)
    group_by_tensor: ByName = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in ("bits", "embedding_bits", "head_bits"):
            if (value := getattr(self, option)) not in BITS and value is not None:
                raise InputError(f"{self.name}: {option} must be 4, 8, 16 or 32, not {value!r}")
        if self.group not in GROUPS:
            raise InputError(f"{self.name}: group must be one of {GROUPS}, not {self.group!r}")
        refuse_values(f"{self.name}: bits_by_tensor", self.bits_by_tensor, BITS)
        refuse_values(f"{self.name}: group_by_tensor", self.group_by_tensor, GROUPS)

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Quantize every matrix of the checkpoint, one at a time."""
        self.check(checkpoint)
        changed: dict[str, Weight] = {}
        skipped: dict[str, str] = {}
        for name, weight in checkpoint.weights.items():
            bits = self.bits_of(name, checkpoint.roles.get(name, "other"))
            result = self._convert(name, weight, bits, work.keeper)
            if isinstance(result, str):
                skipped[name] = result
            else:
                changed[name] = result
        return PassResult(checkpoint.with_weights(changed), skipped)

    def bits_of(self, name: str, role: str) -> int:
        """Return the bits of a weight; 0 where it is no matrix."""
        own = chosen(self.bits_by_tensor, name) if role != "other" else None
        if own is not None:
            return own
        if role == "linear":
            return self.bits
        if role == "head":
            return self.head_bits or self.embedding_bits
        if role == "table":
            # Position tables are small and every token reads one: 4 bits would save nothing worth its error.
            return max(8, self.embedding_bits)
        return self.embedding_bits if role == "embedding" else 0

    def _convert(self, name: str, weight: Weight, bits: int, keeper: Keeper) -> Weight | str:
        if not isinstance(weight, Dense):
            return "already quantized"
        if not bits:
            return "a vector or a norm: small, and precision matters"
        if bits == 32:
            return "kept in 32 bits, as asked"
        if bits == 16:
            return _half(weight)
        if bits == 4 and weight.shape[1] % GROUPS[0]:
            return f"{weight.shape[1]} columns do not divide by {GROUPS[0]}, the smallest group"
        group = self.group_of(name) if bits == 4 else weight.shape[1]
        return keeper.keep(name, lambda: quantize(weight.load(), bits, group, self.search))

    def group_of(self, name: str) -> int:
        """Return the group of a 4-bit matrix."""
        return chosen(self.group_by_tensor, name) or self.group

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what cannot mean what the user asked for."""
        refuse_names(f"{self.name}: bits_by_tensor", self.bits_by_tensor, checkpoint)
        refuse_names(f"{self.name}: group_by_tensor", self.group_by_tensor, checkpoint)
        if checkpoint.tied and self.head_bits not in (None, self.embedding_bits):
            raise InputError(
                f"head bits {self.head_bits} and embedding bits {self.embedding_bits} differ, but this model "
                "ties its head to its embedding: they are one matrix; give both the same bits, or leave out "
                "the head's"
            )
        four = {
            name: weight.shape[1]
            for name, weight in checkpoint.weights.items()
            if self.bits_of(name, checkpoint.roles.get(name, "other")) == 4
            and not weight.shape[1] % GROUPS[0]
        }
        for name, columns in four.items():
            if columns % (group := self.group_of(name)):
                fitting = [str(g) for g in GROUPS if not any(c % g for c in four.values())]
                raise InputError(
                    f"group size {group} does not divide the {columns} columns of {name}; "
                    f"a group size that fits this model: {' or '.join(fitting)}"
                )


def quantize(values: Tensor, bits: int, group: int, search: bool = True) -> Quantized:
    """Return ``values``, floats (out, in), on the grid with the scales of least squared error.

    Blocks of whole rows are worked on, so that the search needs little memory beside the result.
    """
    rows = max(1, _BLOCK // values.shape[1])
    blocks = [_quantize_block(block.float(), bits, group, search) for block in torch.split(values, rows)]
    packed, scales = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Quantized.of((values.shape[0], values.shape[1]), bits, packed, scales)


def _quantize_block(values: Tensor, bits: int, group: int, search: bool) -> tuple[Tensor, Tensor]:
    groups = values.reshape(values.shape[0], -1, group)
    largest = groups.abs().amax(dim=-1)
    best = grid_scale(largest / CODE_RANGE[bits][1])
    if search:
        found = grid_scale(_search(groups, largest, bits))
        best = torch.where(_error(groups, found, bits) < _error(groups, best, bits), found, best)
    return quantized(_codes(groups, best, bits).to(torch.int8).reshape(values.shape), best, bits).load()


def _search(groups: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Return the scales (out, groups) of least squared error among those tried; of groups (out, groups, group)."""
    codes, products = torch.empty_like(groups), torch.empty_like(groups)

    def best_for_codes(scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best scale for the codes that this one gives, and by how much it lessens the error."""
        steps = scale.clamp_min(SMALLEST_SCALE).reciprocal().unsqueeze(-1)
        torch.mul(groups, steps, out=codes).round_().clamp_(*CODE_RANGE[bits])
        # Not as a product with ones: that rounds otherwise with another number of threads, and codes with it.
        covered = torch.mul(codes, groups, out=products).sum(-1)
        better = covered / codes.square_().sum(-1).clamp_min(1)
        return better, covered * better

    best, lessened = best_for_codes(largest / _CLIPS[bits][0])
    for clip in _CLIPS[bits][1:]:
        scale, gain = best_for_codes(largest / clip)
        best, lessened = torch.where(gain > lessened, scale, best), torch.maximum(gain, lessened)
    for _ in range(_REFINEMENTS):
        best, _ = best_for_codes(best)  # never worse: each of the two steps is the best, given the other
    return best


def _codes(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (groups / scale.unsqueeze(-1)).round_().clamp_(*CODE_RANGE[bits])


def _error(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the squared error of each group, float32 (out, groups)."""
    values = _codes(groups, scale, bits).mul_(scale.unsqueeze(-1))
    return values.sub_(groups).square_().sum(-1)


def _half(weight: Dense) -> Weight | str:
    if weight.dtype == torch.float16:
        return "in float16 already"
    if (largest := weight.load().abs().max().item()) > torch.finfo(torch.float16).max:
        return f"holds {largest:.3g}, beyond the range of float16"
    return Dense(weight.shape, torch.float16, lambda: weight.load().to(torch.float16))
