"""What it costs a model to store one matrix in fewer bits: for every matrix and every choice, of one run of the model.

A cost is the distance between what the source says of some text and what it says with this matrix alone quantized:

    decoders     KL divergence from the source's distribution, nats per token
    embeddings   1 - cosine, per text
    scores       KL divergence of the softmax of the scores, per text or per token

It is taken to second order, from the real error of every value and the model's slopes (`curvature`): half of the sum of
squared error times squared slope. Costs of several matrices add up, as long as they are small: each is of second order
in the error of its matrix, and the errors are independent of each other (as in Dong et al., "HAWQ-V2", 2019).
`tests/test_sensitivity.py` and docs/compression.md say how near that comes to running the model with each matrix
quantized, which takes as many runs as there are choices.

Costs are written down under a hash of all that they follow from: the next question about the same model needs no run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_export import __version__
from slm_export.budget.choices import Choice, options_for
from slm_export.budget.curvature import slopes
from slm_export.bundles.bundle import machine_errors
from slm_export.bundles.finished import cache_folder
from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration, Window
from slm_export.optimizers.group_quantize import quantize
from slm_export.source.tasks import GENERATION
from slm_export.weights import Weight, float_blocks

TOKENS = 4096
"""Tokens that costs are measured on, of a vocabulary that is not large."""
_ENCODER_WINDOW = 64
"""An encoder's texts are cut here: they are read side by side, and the longest would fill the others with padding."""
_LOGITS_BYTES = 512 << 20  # of the source's, which stand in memory
_VALUES = 1 << 20  # of a matrix that are worked on at a time

Advance = Callable[[int, str], None]
Costs = Mapping[str, Mapping[Choice, float]]
"""Of every matrix and every choice: what it costs."""


def measure(
    source: Checkpoint, identity: str, calibration: Calibration, advance: Advance
) -> dict[str, dict[Choice, float]]:
    """Return the cost of every matrix at each of its choices; float16 costs nothing.

    Given   identity: all that the weights follow from; what was measured is found again under it
    """
    options = options_for(source)
    text = Text.of(source, calibration.learning)
    record = _Record(_key(identity, text))
    costs = record.read(options)
    if costs is None:
        listener = _Listener(source, options, advance)
        advance(0, f"the model reads {int(text.mask.sum()):,} tokens")
        outputs = slopes(source, text.ids, text.mask, listener)
        costs = {name: {c: sum_ / outputs for c, sum_ in of.items()} for name, of in listener.sums.items()}
        record.write(costs)
    return costs


def count(source: Checkpoint) -> int:
    """Return how many matrices are measured."""
    return len(options_for(source))


@dataclass(frozen=True)
class Text:
    """Windows of token ids, padded to one length."""

    ids: Tensor
    """int64 (windows, tokens)"""
    mask: Tensor
    """int64 (windows, tokens): 1 for a token, 0 for padding behind."""

    @staticmethod
    def of(source: Checkpoint, windows: Sequence[Window]) -> Text:
        """Return the first windows, as many as memory allows."""
        vocabulary = int(source.config.get_text_config().vocab_size) if source.task == GENERATION else 1
        most = min(TOKENS, _LOGITS_BYTES // (4 * vocabulary))
        if source.task != GENERATION:
            windows = [window[:_ENCODER_WINDOW] for window in windows]
        chosen: list[Window] = []
        for window in windows:
            if chosen and sum(map(len, chosen)) + len(window) > most:
                break
            chosen.append(window[:most])
        longest = max(map(len, chosen))
        ids, mask = (torch.zeros(len(chosen), longest, dtype=torch.int64) for _ in range(2))
        for row, window in enumerate(chosen):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
        return Text(ids, mask)


class _Listener:
    """Adds up what every choice costs every matrix, as the slopes come in."""

    def __init__(self, source: Checkpoint, options: Mapping[str, Sequence[Choice]], advance: Advance) -> None:
        self._source, self._advance = source, advance
        self._left = set(options)
        self.sums = {name: dict.fromkeys(choices, 0.0) for name, choices in options.items()}

    def __call__(self, name: str, given: Tensor, slope: Tensor) -> None:
        """Weigh the errors of a matrix with the squared slopes of its values.

        Given   of a linear layer float32 (windows, ..., in), of a table int64 (windows, ...); slopes float32
                (windows, ..., out)
        """
        if name not in self.sums:
            return
        weight = self._source.weights[name]
        with torch.no_grad():
            if given.is_floating_point():
                self._add_linear(name, weight, given, slope)
            else:
                self._add_table(name, weight, given, slope)
        self._advance(int(name in self._left), name)
        self._left.discard(name)

    def _add_linear(self, name: str, weight: Weight, given: Tensor, slope: Tensor) -> None:
        start = 0
        for values in float_blocks(weight, _VALUES):
            squares = torch.zeros_like(values)
            for x, y in zip(given, slope, strict=True):
                of_rows = y[..., start : start + len(values)].reshape(-1, len(values))
                squares += (of_rows.t() @ x.reshape(-1, x.shape[-1])).square_()
            self._weigh(name, values, squares)
            start += len(values)

    def _add_table(self, name: str, weight: Weight, given: Tensor, slope: Tensor) -> None:
        """Only rows that were looked up have a slope."""
        seen, places = torch.unique(given, return_inverse=True)
        squares = torch.zeros(len(seen), weight.shape[1])
        for at, y in zip(places, slope, strict=True):
            once = torch.zeros_like(squares).index_add_(0, at.flatten(), y.reshape(-1, y.shape[-1]))
            squares += once.square_()
        self._weigh(name, weight.rows(seen), squares)

    def _weigh(self, name: str, values: Tensor, squares: Tensor) -> None:
        for choice in self.sums[name]:
            if choice.bits < 16:
                made = quantize(values, choice.bits, choice.group or values.shape[1]).float32()
                self.sums[name][choice] += 0.5 * ((made - values).square_() * squares).sum().item()


def _key(identity: str, text: Text) -> str:
    follows_from = [__version__, "slopes", identity, text.ids.tolist(), text.mask.tolist()]
    return hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()


class _Record:
    """What has been measured, in a file of the cache folder."""

    def __init__(self, key: str) -> None:
        self._path = cache_folder() / "sensitivity" / f"{key[:32]}.jsonl"

    def read(self, options: Mapping[str, Sequence[Choice]]) -> dict[str, dict[Choice, float]] | None:
        """Return what is there; None unless it is all that is wanted."""
        found: dict[str, dict[Choice, float]] = {name: {} for name in options}
        for name, choice, cost in self._lines():
            if choice in options.get(name, ()):
                found[name][choice] = cost
        return found if all(len(found[name]) == len(options[name]) for name in options) else None

    def _lines(self) -> Iterator[tuple[str, Choice, float]]:
        if not self._path.exists():
            return
        for line in self._path.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
                yield entry["name"], Choice(entry["bits"], entry["group"]), float(entry["cost"])
            except (ValueError, KeyError, TypeError):
                continue

    def write(self, costs: Costs) -> None:
        """Write all measurements down."""
        lines = [
            json.dumps({"name": name, "bits": choice.bits, "group": choice.group, "cost": cost}) + "\n"
            for name, of in costs.items()
            for choice, cost in of.items()
        ]
        with machine_errors("keep measurements", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(".part")
            part.write_text("".join(lines), encoding="utf-8")
            os.replace(part, self._path)
