"""Training against the integer grid that ships: fake quantization with the export's own codes and scales.

From a share of the steps on, every matrix that an export would quantize stands in the forward pass as code * scale; the
gradient goes through the rounding as if it were not there (straight-through estimator, Bengio et al., 2013; for
language models Liu et al., "LLM-QAT", 2023). Scales are those of `optimizers.group_quantize`, searched anew every few
steps and wherever a killed run may go on; codes follow the weights at every step.

What is saved are the values code * scale, and an export of them finds the same codes and the same scales: `settled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.learning.distil_settings import Grid
from slm_export.learning.processes import world
from slm_export.learning.settings import Training
from slm_export.learning.trainer import Batch, Loss
from slm_export.optimizers.group_quantize import GroupQuantize, quantize
from slm_export.weights import CODE_RANGE, GROUPS, Quantized

_SETTLING = 4
"""Times that values are quantized again before the search for scales is left out, of the few that did not settle."""


@dataclass(frozen=True)
class Stored:
    """How a matrix is stored."""

    bits: int
    group: int
    """Columns that share a scale."""
    transposed: bool
    """Whether the module holds it as (in, out)."""


class OnGrid:
    """A loss around a loss, of the model as an export would store it; a watcher, because scales follow the weights."""

    def __init__(self, loss: Loss, module: nn.Module, checkpoint: Checkpoint, grid: Grid, training: Training):
        if world() > 1:
            raise InputError("--for-bits: trains in one process; start it without torchrun")
        self._loss, self._module, self._grid, self._training = loss, module, grid, training
        self._begins = round(grid.begins * training.steps)
        self._stored = stored_as(checkpoint, grid)
        self._scales: dict[str, Tensor] = {}

    def before_step(self, step: int) -> None:
        """Search for scales, where it is time to."""
        if step < self._begins:
            return
        due = (step - self._begins) % self._grid.search_every == 0
        if due or step % self._training.checkpoint_steps == 0 or not self._scales:
            self.search()

    @torch.no_grad()
    def search(self) -> None:
        """Take the scales that an export of the weights would find now."""
        parameters = dict(self._module.named_parameters())
        for name, stored in self._stored.items():
            values = _oriented(parameters[name].detach(), stored)
            found = quantize(values.cpu(), stored.bits, stored.group)
            self._scales[name] = found.scales.to(values.device)

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the loss on the grid, once it has begun."""
        return self._loss(self.standing(module), batch)

    def standing(self, module: nn.Module) -> Any:
        """Return the module as an export would store it now; as it is, before the grid has begun."""
        return _Standing(module, self.weights(module)) if self._scales else module

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Return code * scale of every matrix, with the gradient of the weight itself."""
        parameters = dict(module.named_parameters())
        made = {}
        for name, stored in self._stored.items():
            values = _oriented(parameters[name], stored)
            rounded = rounded_to(values.detach(), self._scales[name], stored.bits)
            made[name] = _oriented(values + (rounded - values.detach()), stored)
        return made


class _Standing:
    """A module with some of its weights replaced for one call; the rest of it as it is."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._module, self._weights = module, weights

    def __call__(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self._module, dict(self._weights), (), inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def rounded_to(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return code * scale of values (out, in) with scales (out, groups)."""
    groups = values.view(*scales.shape, -1)
    codes = (groups / scales.unsqueeze(-1)).round_().clamp_(*CODE_RANGE[bits])
    return codes.mul_(scales.unsqueeze(-1)).view(values.shape)


def stored_as(checkpoint: Checkpoint, grid: Grid) -> dict[str, Stored]:
    """Return the matrices that an export quantizes, and how.

    Raises:
        InputError: the group size does not divide a matrix, as the export itself says it.
    """
    step = quantization(grid)
    step.check(checkpoint)
    made = {}
    for name, weight in checkpoint.weights.items():
        bits = step.bits_of(name, checkpoint.roles.get(name, "other"))
        if not bits or (bits == 4 and weight.shape[1] % GROUPS[0]):
            continue
        group = step.group if bits == 4 else weight.shape[1]
        made[name] = Stored(bits, group, name in checkpoint.transposed)
    return made


def quantization(grid: Grid) -> GroupQuantize:
    """Return the pass that exports such a model."""
    return GroupQuantize(bits=grid.bits, group=grid.group, embedding_bits=grid.embedding_bits)


def settled(values: Tensor, bits: int, group: int) -> Quantized:
    """Return values (out, in) on the grid, such that `quantize` finds the same codes and scales in what they stand for.

    A row whose largest code is 7 (127 of 8 bits) is its own best quantization, and most others are; what is not after
    a few times is taken without search, which always is.
    """
    found = quantize(values, bits, group)
    rows = torch.arange(0)
    for _ in range(_SETTLING):
        again = quantize(found.float32(), bits, group)
        rows = _differing(found, again)
        if not len(rows):
            return found
        found = again
    packed, scales = (part.clone() for part in found.load())
    plain = quantize(values[rows], bits, group, search=False)
    packed[rows], scales[rows] = plain.load()
    return Quantized.of(found.shape, bits, packed, scales)


@torch.no_grad()
def put_on_grid(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Replace the weights of a module by those that its export will have."""
    parameters = dict(module.named_parameters())
    for name, how in stored.items():
        values = _oriented(parameters[name].detach(), how)
        on_grid = settled(values.cpu().float(), how.bits, how.group).float32()
        parameters[name].copy_(_oriented(on_grid.to(values.device), how))


def _differing(first: Quantized, second: Quantized) -> Tensor:
    """Return the rows in which two matrices are not the same, int64."""
    same = (first.packed == second.packed).all(-1) & (first.scales == second.scales).all(-1)
    return (~same).nonzero()[:, 0]


def _oriented(values: Tensor, stored: Stored) -> Tensor:
    return values.t().contiguous() if stored.transposed else values
