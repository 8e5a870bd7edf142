"""Scale channels that matter up before they are rounded; the model computes the same.

Given   Dense matrices of a model that is a sequence of blocks, and text
Result  the same function: columns of matrices multiplied by one factor per channel, and what feeds them divided by it

The rounding error of a column is about the same whatever its inputs, so columns of large inputs are made larger (Lin et
al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023). Factors are the root
mean squares of the inputs to a power that is searched for, by what rounding then costs. They are folded into the norm
or the matrix before; which that is, is found by trying it: a block that then gives something else keeps what it had.
The pass rounds nothing: put one that does behind it, with the same bits and group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.blocks import CannotWalk
from slm_export.compression.blockwise import Block, Walk
from slm_export.compression.rounding import cost, damped, nearest, weighted_scales
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError
from slm_export.graph.norms import rms_norm_of
from slm_export.weights import GROUPS, Dense, Weight

_POWERS = tuple(power / 10 for power in range(11))
_ROWS = 256  # of a matrix, evenly spread, on which powers are compared
_TOLERANCE = 1e-4
"""Largest change of a block's output, as a share of its largest value, that is float32's and not another formula's."""
_SAMPLE = 64  # tokens that are looked at for that

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Awq:
    """Options: the bits and the group that matrices will be rounded to."""

    name: ClassVar[str] = "awq"
    calibrated: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = True

    bits: int = 4
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"{self.name}: bits must be 4 or 8, not {self.bits!r}")
        if self.group not in GROUPS:
            raise InputError(f"{self.name}: group must be one of {GROUPS}, not {self.group!r}")

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a model that is quantized already."""
        if not all(isinstance(weight, Dense) for weight in checkpoint.weights.values()):
            raise InputError(f"{self.name}: the model is quantized already; put this pass before that")

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Return the model with channels scaled where that makes rounding cheaper."""
        self.check(checkpoint)
        text = work.text(self.name)
        made: dict[str, Weight] = {}
        scaled = stages = 0
        with work.folder() as folder:
            try:
                walk = Walk(checkpoint, text.learning, folder, advance=work.advance)
                walk.forget()  # which weights an interrupted run had changed is not known: it begins anew
            except CannotWalk as error:
                note = f"no channel was scaled: {error}"
                return PassResult(checkpoint, dict.fromkeys(checkpoint.weights, "not scaled"), (note,))
            for block in walk:
                changed: Values = {}
                for stage in block.stages:
                    stages += 1
                    scaled += self._scale(block, stage, changed)
                for name, values in changed.items():
                    made[name] = work.keeper.keep(name, partial(_dense, values))
        skipped = {name: "not scaled" for name in checkpoint.weights if name not in made}
        note = f"{scaled} of {stages} inputs of matrices were scaled"
        return PassResult(checkpoint.with_weights(made), skipped, (note,))

    def _scale(self, block: Block, stage: tuple[str, ...], changed: Values) -> bool:
        """Scale what the matrices of a stage are given; return whether that was possible and worth it."""
        first = block.linears[stage[0]]
        if self.bits == 4 and first.in_features % self.group:
            return False
        probe = torch.rand(first.in_features, generator=torch.Generator().manual_seed(0)) + 0.5
        fold = next((f for f in _folds(block, stage) if _is_exact(block, stage, f, probe)), None)
        if fold is None:
            return False
        gram = damped(block.gram(stage[0]), 0.01)
        factors = self._best([matrix(block, name) for name in stage], gram)
        if factors is None:
            return False
        changed.update(_columns(block, stage, factors))
        changed.update(fold(factors))
        return True

    def _best(self, matrices: list[Tensor], gram: Tensor) -> Tensor | None:
        """Return the factors (in,) of least cost; None where leaving all as it is costs least."""
        size = gram.diagonal().sqrt()
        samples = [values[:: max(1, len(values) // _ROWS)] for values in matrices]
        least, best = float("inf"), None
        for power in _POWERS:
            factors = size**power
            factors = factors / (factors.max() * factors.min()).sqrt()
            found = sum(self._cost(values, factors, gram) for values in samples)
            if found < least:
                least, best = found, (factors if power else None)
        return best

    def _cost(self, values: Tensor, factors: Tensor, gram: Tensor) -> float:
        scaled = values * factors
        group = self.group if self.bits == 4 else values.shape[1]
        scales = weighted_scales(scaled, torch.ones(values.shape[1]), self.bits, group)
        codes = nearest(scaled, scales.repeat_interleave(group, 1), self.bits)
        # The error as the inputs will meet it: they are divided by the factors.
        return cost(scaled, gram / torch.outer(factors, factors), codes, scales).sum().item()


Fold = Callable[[Tensor], Values]
"""Divides what feeds a stage by factors (in,), in its place in the block; returns the new values by name."""


def matrix(block: Block, name: str) -> Tensor:
    """Return the matrix that a linear layer of the block has now."""
    values = block.linears[name].matrix
    assert values is not None
    return values


def _folds(block: Block, stage: tuple[str, ...]) -> Iterator[Fold]:
    """Yield what may feed a stage: norms of its width, then matrices with as many rows, the latest first."""
    width = block.linears[stage[0]].in_features
    for path, part in block.module.named_modules():
        if path and _is_norm(part, width):
            yield partial(_into_norm, part, f"{block.path}.{path}")
    before = block.stages[: block.stages.index(stage)]
    for name in (name for earlier in reversed(before) for name in reversed(earlier)):
        if block.linears[name].out_features == width:
            yield partial(_into_rows, block, name)


def _is_norm(part: nn.Module, width: int) -> bool:
    weight = getattr(part, "weight", None)
    known = isinstance(part, nn.LayerNorm) or rms_norm_of(part) is not None
    return known and isinstance(weight, Tensor) and weight.shape == (width,)


@torch.no_grad()
def _into_norm(part: nn.Module, path: str, factors: Tensor) -> Values:
    found = rms_norm_of(part)
    made: Values = {}
    for key, parameter in part.named_parameters(recurse=False):
        # Gemma's norms store what they add to 1.
        plus = 1.0 if key == "weight" and found is not None and not torch.equal(found[0], parameter) else 0.0
        made[f"{path}.{key}"] = parameter.copy_((parameter + plus) / factors - plus).clone()
    return made


@torch.no_grad()
def _into_rows(block: Block, name: str, factors: Tensor) -> Values:
    linear = block.linears[name]
    linear.matrix = matrix(block, name) / factors.unsqueeze(1)
    made = {name: linear.matrix}
    if linear.bias is not None:
        linear.bias = linear.bias / factors
        made[name.removesuffix("weight") + "bias"] = linear.bias
    return made


def _columns(block: Block, stage: tuple[str, ...], factors: Tensor) -> Values:
    """Multiply the columns of the matrices of a stage."""
    for name in stage:
        block.linears[name].matrix = matrix(block, name) * factors
    return {name: matrix(block, name) for name in stage}


def _is_exact(block: Block, stage: tuple[str, ...], fold: Fold, factors: Tensor) -> bool:
    """Return whether a block gives the same when its matrices and what feeds them are scaled; it is left as it was."""
    expected = _output(block)
    with _restored(block):
        _columns(block, stage, factors)
        fold(factors)
        got = _output(block)
    return bool((got - expected).abs().max() <= _TOLERANCE * expected.abs().max())


@contextmanager
def _restored(block: Block) -> Iterator[None]:
    """Give a block back what it had."""
    parameters = [(parameter, parameter.clone()) for parameter in block.module.parameters()]
    linears = [(linear, linear.matrix, linear.bias) for linear in block.linears.values()]
    yield
    with torch.no_grad():
        for parameter, values in parameters:
            parameter.copy_(values)
    for linear, values_then, bias in linears:
        linear.matrix, linear.bias = values_then, bias


@torch.no_grad()
def _output(block: Block) -> Tensor:
    return block.run(block.batches[-1]).flatten(0, -2)[:_SAMPLE]


def _dense(values: Tensor) -> Dense:
    return Dense(tuple(values.shape), values.dtype, lambda: values)
