"""Set the values of linear layers to 0 that matter least, for a runtime that gains from zeros wherever they lie.

Given   Dense matrices (out, in) of linear layers
Result  the same, ``fraction`` of every row 0, or of every ``block`` neighbouring columns of it (n:m)

Which values go:

    magnitude   the smallest
    wanda       those of least |value| * root mean square of its input (Sun et al., "A Simple and Effective Pruning
                Approach for Large Language Models", 2023)
    sparsegpt   column by column, those whose absence the columns behind them can make up for best, and these do
                (Frantar and Alistarh, "SparseGPT", 2023; inputs are those of the dense model)

A zero that is multiplied like any other number saves nothing, and in most runtimes it is: which gain is said by each
exporter (`Exporter.dense_only`), and the others are refused before any work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.distance import Distance, spread
from slm_export.compression.moments import Moments, second_moments
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError
from slm_export.weights import Dense

METHODS = ("magnitude", "wanda", "sparsegpt")
BLOCKS = (0, 2, 4, 8, 16)
LEAST = 0.5
"""Of the values: with fewer zeros, a mask and what it leaves are hardly smaller than all values."""
_CHUNK = 128
"""Columns whose zeros are chosen together, as in the paper."""
_DAMPING = 0.01
"""Share of the mean square of the inputs that is added to every square, as in the paper."""
_MEASURED = 4096


@dataclass(frozen=True)
class Sparsify:
    """Options: how many values go, in which pattern, by which rule."""

    name: ClassVar[str] = "sparsify"
    calibrated: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = False

    fraction: float = 0.5
    block: int = 0
    """Neighbouring columns that lose their share each, one of `BLOCKS`: 4 is 2:4. 0: anywhere in a row."""
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    tokens: int = 16_384
    """Of calibration text."""

    def __post_init__(self) -> None:
        if not LEAST <= self.fraction < 1:
            raise InputError(
                f"sparsify: fraction must be at least {LEAST:g} and below 1, not {self.fraction!r}"
            )
        if self.block not in BLOCKS:
            raise InputError(
                f"sparsify: block must be one of {', '.join(map(str, BLOCKS))}, not {self.block!r}"
            )
        if (zeros := self.fraction * self.block) != round(zeros):
            raise InputError(
                f"sparsify: a fraction of {self.fraction:g} of {self.block} columns is no whole number"
            )
        if self.method not in METHODS:
            raise InputError(f"sparsify: method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.tokens < 1:
            raise InputError(f"sparsify: tokens must be positive, and is {self.tokens}")

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a block that does not divide the columns of a matrix."""
        for name, weight in checkpoint.weights.items():
            if checkpoint.roles[name] == "linear" and self.block and weight.shape[1] % self.block:
                raise InputError(
                    f"sparsify: {name} has {weight.shape[1]} columns, which blocks of {self.block} do not divide"
                )

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Measure the inputs, and set values to 0 one matrix at a time."""
        self.check(checkpoint)
        text = work.text(self.name)
        linear = {n: w for n, w in checkpoint.weights.items() if checkpoint.roles[n] == "linear"}
        dense = {name: weight for name, weight in linear.items() if isinstance(weight, Dense)}
        if quantized := sorted(linear.keys() - dense.keys()):
            raise InputError(
                f"sparsify: {quantized[0]} is quantized already; let this pass come before the quantization"
            )
        with work.folder() as folder:
            modules = [name.removesuffix(".weight") for name in dense]
            windows = spread(text.learning, self.tokens)
            moments = second_moments(checkpoint, modules, windows, folder, work.advance)
            made = {
                name: work.keeper.keep(name, partial(self._convert, name, weight, moments))
                for name, weight in dense.items()
            }
        result = checkpoint.with_weights(made)
        skipped = {name: "no linear layer" for name in checkpoint.weights if name not in made}
        distance = Distance(checkpoint, text.held_out, _MEASURED)
        note = (
            f"{self.fraction:.0%} of {sum(w.count for w in made.values()):,} values are 0; {distance.words} from the "
            f"model before: {distance.to(result):.4g} on calibration text that nothing was chosen by"
        )
        return PassResult(result, skipped, (note,))

    def _convert(self, name: str, weight: Dense, moments: Moments) -> Dense:
        inputs = moments[name.removesuffix(".weight")]()[:-1, :-1]
        values = self.sparse(weight.float32(), inputs).to(weight.dtype)
        return Dense(weight.shape, weight.dtype, lambda: values)

    def sparse(self, matrix: Tensor, inputs: Tensor) -> Tensor:
        """Return a matrix with its zeros, float32 (out, in).

        Given   matrix float32 (out, in); inputs float32 (in, in), the mean of x x^T
        """
        if self.method == "sparsegpt":
            return self._compensated(matrix, inputs)
        size = matrix.abs()
        if self.method == "wanda":
            size = size * inputs.diagonal().sqrt()
        return matrix.masked_fill(self._lowest(size), 0)

    def _compensated(self, matrix: Tensor, inputs: Tensor) -> Tensor:
        w, columns = matrix.double(), matrix.shape[1]
        upper = _inverse_root(inputs.double())
        chunk = max(_CHUNK, self.block)
        for begin in range(0, columns, chunk):
            end = min(begin + chunk, columns)
            gone = self._lowest((w[:, begin:end] / upper.diagonal()[begin:end]).abs())
            errors = torch.zeros_like(w[:, begin:end])
            for column in range(begin, end):
                lost = torch.where(gone[:, column - begin], w[:, column], 0) / upper[column, column]
                w[:, column:end] -= lost.outer(upper[column, column:end])
                errors[:, column - begin] = lost
            w[:, end:] -= errors @ upper[begin:end, end:]
            w[:, begin:end].masked_fill_(gone, 0)  # rounding left some 1e-17
        return w.float()

    def _lowest(self, scores: Tensor) -> Tensor:
        """Return which values go, bool (out, columns): the lowest of every block, or of the row."""
        blocks = scores.view(scores.shape[0], -1, self.block or scores.shape[1])
        count = round(self.fraction * blocks.shape[2])
        order = blocks.argsort(dim=-1, stable=True)
        gone = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[..., :count], value=True)
        return gone.view(scores.shape)


def _inverse_root(inputs: Tensor) -> Tensor:
    """Return U, upper triangular, with U^T U the inverse of the damped moments, float64 (in, in)."""
    damped = inputs.clone()
    squares = damped.diagonal()
    squares += _DAMPING * squares.mean() + torch.finfo(torch.float64).tiny
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root
