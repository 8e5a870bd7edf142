"""Take the parts out of layers that matter least, and let the others do their work.

Within a layer, parts are ranked by what they add to its output: the mean square of their share on calibration text.
What is left is refitted by least squares (`moments.refit`). How many go from which layer follows from measurement: each
layer alone is made narrower in a few steps, and what the model then says is held against what it said; parts go where
that costs least. On the model of examples/ this takes a tenth of the loss of equal shares (docs/compression.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.calibration import Calibration, Window
from slm_export.compression.distance import Distance, spread
from slm_export.compression.geometry import Parts
from slm_export.compression.moments import Moments, refit, second_moments
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.weights import Dense, Weight

_MEASURED = 1024
"""Tokens that a step of one layer is measured on."""
_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the parts of a layer: the steps that are measured, as far as a layer keeps one multiple."""

Steps = Sequence[tuple[int, float]]
"""Parts that are gone, and what that costs; from none and nothing on, ascending."""


@dataclass(frozen=True)
class Wanted:
    """What is to go."""

    asking: str
    """The name of the pass."""
    what: str
    """What the parts are, for people: neurons."""
    fraction: float
    """Of all parts of the model."""
    multiple: int
    """Parts of a layer go, and stay, in multiples of this."""
    uniform: bool
    """Whether all layers lose equally many."""
    tokens: int
    """Of calibration text."""
    refit: bool = True


def narrowed(checkpoint: Checkpoint, layers: Sequence[Parts], wanted: Wanted, work: Workbench) -> PassResult:
    """Return the narrower model, and notes on what went and what that costs.

    Raises:
        InputError: a matrix is quantized already, there is no text, or so few parts are to go that none does.
    """
    _refuse_quantized(checkpoint, layers, wanted.asking)
    text = work.text(wanted.asking)
    count(layers, wanted)  # an error in the options is told of before the model reads
    with work.folder() as folder:
        narrowing = Narrowing(checkpoint, layers, wanted, spread(text.learning, wanted.tokens), folder, work)
        gone = narrowing.allocation(text)
        made: dict[str, Weight] = {}
        for parts, number in zip(layers, gone, strict=True):
            work.advance(0, parts.path)
            if number:
                made |= _kept(narrowing.without(parts, number), work)
    result = checkpoint.with_weights(made)
    skipped = {name: _why(name, layers) for name in checkpoint.weights if name not in made}
    return PassResult(result, skipped, _notes(checkpoint, result, layers, gone, wanted, text))


def count(layers: Sequence[Parts], wanted: Wanted) -> int:
    """Return how many parts go in all, in multiples.

    Raises:
        InputError: none, or so many that a layer would be empty.
    """
    if wanted.uniform:
        each = {parts.count: _rounded(wanted.fraction * parts.count, wanted.multiple) for parts in layers}
        number = sum(each[parts.count] for parts in layers)
    else:
        number = _rounded(wanted.fraction * sum(parts.count for parts in layers), wanted.multiple)
    most = sum(_most(parts, wanted) for parts in layers)
    if (
        not number
        or number > most
        or (wanted.uniform and any(each[p.count] > _most(p, wanted) for p in layers))
    ):
        widths = sorted({parts.count for parts in layers})
        raise InputError(
            f"{wanted.asking}: a fraction of {wanted.fraction:g} of {widths[-1]} {wanted.what} of a layer is "
            f"{'none' if not number else 'all'} in multiples of {wanted.multiple}"
            f"{', the same in every layer' if wanted.uniform else ''}; give another fraction, a smaller multiple or "
            "uniform = false"
        )
    return number


class Narrowing:
    """The layers of one model, ready to be made narrower by any number of parts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[Parts],
        wanted: Wanted,
        windows: Sequence[Window],
        folder: Path,
        work: Workbench,
    ) -> None:
        self._checkpoint, self._layers, self._wanted, self._work = checkpoint, layers, wanted, work
        names = [parts.out for parts in layers]
        self._moments: Moments = second_moments(checkpoint, names, windows, folder, work.advance)
        self._orders: dict[str, Tensor] = {}

    def order(self, parts: Parts) -> Tensor:
        """Return the parts of a layer, int64 (parts,), those that add least to its output first."""
        if parts.path not in self._orders:
            matrix, moments = self._dense(f"{parts.out}.weight").float32(), self._moments[parts.out]()
            self._orders[parts.path] = contributions(matrix, moments, parts.columns).argsort(stable=True)
        return self._orders[parts.path]

    def without(self, parts: Parts, number: int) -> dict[str, Dense]:
        """Return the weights of a layer without so many of its parts, the rest refitted."""
        stay = self.order(parts)[number:].sort().values
        columns = parts.columns[stay].flatten().sort().values
        matrix, bias_name = self._dense(f"{parts.out}.weight"), f"{parts.out}.bias"
        bias = self._dense(bias_name) if bias_name in self._checkpoint.weights else None
        made: dict[str, Dense] = {}
        if self._wanted.refit:
            values, offset = refit(
                matrix.float32(),
                None if bias is None else bias.float32(),
                self._moments[parts.out](),
                columns,
            )
            made[f"{parts.out}.weight"] = _in_memory(values.to(matrix.dtype))
            if bias is not None and offset is not None:
                made[bias_name] = _in_memory(offset.to(bias.dtype))
        else:
            made[f"{parts.out}.weight"] = _in_memory(matrix.load()[:, columns].contiguous())
        for name, rows in parts.rows.items():
            chosen = rows[stay].flatten().sort().values
            for each in (f"{name}.weight", f"{name}.bias"):
                if each in self._checkpoint.weights:
                    made[each] = _in_memory(self._dense(each).load()[chosen].contiguous())
        return made

    def allocation(self, text: Calibration) -> list[int]:
        """Return how many parts go from every layer."""
        wanted, layers = self._wanted, self._layers
        if wanted.uniform or len(layers) == 1:
            return [_rounded(wanted.fraction * parts.count, wanted.multiple) for parts in layers]
        distance = Distance(self._checkpoint, text.learning, _MEASURED)
        measured = [self._steps(parts, distance) for parts in layers]
        sizes = [parts.parameters(self._checkpoint) for parts in layers]
        return allocate(measured, sizes, wanted.multiple, count(layers, wanted))

    def _steps(self, parts: Parts, distance: Distance) -> Steps:
        most = _most(parts, self._wanted)
        numbers = sorted(
            {min(_rounded(share * parts.count, self._wanted.multiple), most) for share in _SHARES} - {0}
        )
        steps = [(0, 0.0)]
        for number in numbers:
            self._work.advance(0, f"{parts.path} without {number} of {parts.count}")
            narrower = self._checkpoint.with_weights(self.without(parts, number))
            # Less than before is chance: what is gone does not come back.
            steps.append((number, max(distance.to(narrower), steps[-1][1])))
        return steps

    def _dense(self, name: str) -> Dense:
        weight = self._checkpoint.weights[name]
        assert isinstance(weight, Dense)
        return weight


def contributions(matrix: Tensor, moments: Tensor, columns: Tensor) -> Tensor:
    """Return the mean square of what each part adds to the output, float32 (parts,).

    With x the activations of a part and W its columns: E |W x|^2 = tr(E[x x^T] W^T W). For one column it is the
    square of Wanda's score, summed over the output (Sun et al., 2023; An et al., "FLAP", 2023).

    Given   matrix (out, in), moments (in + 1, in + 1), columns int64 (parts, columns)
    """
    if columns.shape[1] == 1:
        of_each = moments.diagonal()[:-1] * matrix.square().sum(0)
        return of_each[columns[:, 0]]
    return torch.stack(
        [(moments[part][:, part] * (matrix[:, part].t() @ matrix[:, part])).sum() for part in columns]
    )


def allocate(measured: Sequence[Steps], sizes: Sequence[int], multiple: int, number: int) -> list[int]:
    """Return how many parts go from every layer, ``number`` in all: each time where a value costs least.

    Given   sizes: values of one part of each layer
    """
    gone = [0] * len(measured)

    def price(layer: int) -> float:
        after = gone[layer] + multiple
        if after > measured[layer][-1][0]:
            return float("inf")
        return (_cost(measured[layer], after) - _cost(measured[layer], gone[layer])) / sizes[layer]

    for _ in range(number // multiple):
        cheapest = min(range(len(measured)), key=price)
        assert price(cheapest) < float("inf")
        gone[cheapest] += multiple
    return gone


def _cost(steps: Steps, gone: int) -> float:
    """Return what it costs that so many are gone, on straight lines between what was measured."""
    for (low, cheap), (high, dear) in pairwise(steps):
        if gone <= high:
            return cheap + (dear - cheap) * (gone - low) / (high - low)
    return steps[-1][1]


def _most(parts: Parts, wanted: Wanted) -> int:
    """Return how many parts a layer can lose; one multiple stays."""
    return (parts.count - 1) // wanted.multiple * wanted.multiple


def _rounded(number: float, multiple: int) -> int:
    return round(number / multiple) * multiple


def _in_memory(values: Tensor) -> Dense:
    return Dense(tuple(values.shape), values.dtype, lambda: values)


def _kept(made: Mapping[str, Dense], work: Workbench) -> dict[str, Weight]:
    def of(name: str) -> Callable[[], Dense]:
        return lambda: made[name]

    return {name: work.keeper.keep(name, of(name)) for name in made}


def _refuse_quantized(checkpoint: Checkpoint, layers: Sequence[Parts], asking: str) -> None:
    for parts in layers:
        for name in (*parts.rows, parts.out):
            if not isinstance(checkpoint.weights[f"{name}.weight"], Dense):
                raise InputError(f"{asking}: {name} is quantized already; let this pass come before")


def _why(name: str, layers: Sequence[Parts]) -> str:
    module = name.rpartition(".")[0]
    if any(module in (*parts.rows, parts.out) for parts in layers):
        return "nothing of this layer is removed"
    return "has no such parts"


def _notes(
    before: Checkpoint,
    after: Checkpoint,
    layers: Sequence[Parts],
    gone: Sequence[int],
    wanted: Wanted,
    text: Calibration,
) -> tuple[str, ...]:
    total = sum(parts.count for parts in layers)
    distance = Distance(before, text.held_out, 4 * _MEASURED)
    left = ", ".join(f"{parts.count - number:,}" for parts, number in zip(layers, gone, strict=True))
    return (
        f"{sum(gone):,} of {total:,} {wanted.what} removed ({sum(gone) / total:.1%}), layers keep {left}; "
        f"{distance.words} from the model before: {distance.to(after):.4g} on calibration text that was not fitted to",
    )
