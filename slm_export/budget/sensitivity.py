"""What it costs a model to store one matrix in fewer bits: measured, one matrix and one choice at a time.

The distance between what the source says of some text and what it says with this matrix alone quantized:

    decoders     KL divergence from the source's distribution, nats per token
    embeddings   1 - cosine, per text
    scores       KL divergence of the softmax of the scores, per text or per token

Costs of several matrices add up, as long as they are small: each is of second order in the error of its matrix, and
the errors are independent of each other (as in Dong et al., "HAWQ-V2", 2019, and Hubara et al., "AdaQuant", 2020).
`tests/test_sensitivity.py` and docs/compression.md say how well they do.

A run of the model begins at the block that holds the matrix: those before it say what they said of the source. A
measurement is written down at once, under a hash of all that it follows from, so that one that was killed goes on,
and a second question about the same model is answered in seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export import __version__
from slm_export.budget.choices import Choice, options_for
from slm_export.bundles.bundle import machine_errors
from slm_export.bundles.finished import cache_folder
from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration, Window
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import quantize
from slm_export.source.tasks import EMBEDDING, GENERATION
from slm_export.weights import Dense, Weight

TOKENS = 4096
"""Tokens that a cost is measured on, of a vocabulary that is not large."""
_ENCODER_WINDOW = 64
"""An encoder's texts are cut here: they are read side by side, and the longest would fill the others with padding."""
_LOGITS_BYTES = 512 << 20  # of the source's, which stand in memory

Advance = Callable[[int, str], None]
Costs = Mapping[str, Mapping[Choice, float]]
"""Of every matrix and every choice: what it costs."""


@torch.no_grad()
def measure(
    source: Checkpoint, identity: str, calibration: Calibration, advance: Advance
) -> dict[str, dict[Choice, float]]:
    """Return the cost of every matrix at each of its choices; float16 costs nothing.

    Given   identity: all that the weights follow from; what was measured is found again under it
    """
    options = options_for(source)
    text = Text.of(source, calibration.learning)
    record = _Record(_key(identity, text))
    costs = {
        name: dict.fromkeys((c for c in choices if c.bits == 16), 0.0) for name, choices in options.items()
    }
    wanted = {name: [c for c in choices if c.bits < 16] for name, choices in options.items()}
    for name, choice, cost in record.read():
        if choice in wanted.get(name, ()):
            costs[name][choice] = cost
            wanted[name].remove(choice)
            advance(1, name)
    if not any(wanted.values()):
        return costs
    reading = Reading(source, text)
    for name in reading.in_order(wanted):
        weight = source.weights[name]
        for choice in wanted[name]:
            advance(0, f"{name} in {choice}")
            costs[name][choice] = reading.cost(name, quantized_as(weight, choice))
            record.add(name, choice, costs[name][choice])
            advance(1, name)
    return costs


def count(source: Checkpoint) -> int:
    """Return how many measurements there are to make."""
    return sum(choice.bits < 16 for choices in options_for(source).values() for choice in choices)


def quantized_as(weight: Weight, choice: Choice) -> Tensor:
    """Return the values of a matrix after a round trip through a choice, float32."""
    assert isinstance(weight, Dense)
    return quantize(weight.load(), choice.bits, choice.group or weight.shape[1]).float32()


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


class Reading:
    """The source model, what it says of a text, and what it says with other values in a matrix."""

    def __init__(self, source: Checkpoint, text: Text) -> None:
        self._source, self._text = source, text
        self._replaced: dict[str, Tensor] = {}
        self._model = build_reference(_switched(source, self._replaced))
        self._path, self._blocks = _blocks_of(self._model)
        self._at = 0
        """The block that runs begin at."""
        with _called(self._blocks) as order:
            self._said = self._log_probabilities(self._run())
        if order != list(range(len(self._blocks))):
            # A block that is run again (ALBERT) has not said its last when the next one begins.
            self._path, self._blocks = "", []

    def in_order(self, names: Mapping[str, object]) -> list[str]:
        """Return names in the order of their blocks, in which nothing is computed twice."""
        return sorted(names, key=self._block_of)

    def cost(self, name: str, values: Tensor) -> float:
        """Return the mean distance from the source of the model with other values in one matrix."""
        self._begin_at(self._block_of(name))
        return self.cost_of({name: values})

    def cost_of(self, replaced: Mapping[str, Tensor]) -> float:
        """Return the mean distance with other values in some matrices."""
        self._replaced.update(replaced)
        try:
            return self._distance(self._log_probabilities(self._run()))
        finally:
            self._replaced.clear()

    def _block_of(self, name: str) -> int:
        """Return the first block that a matrix has a say in; for a head of its own, the one after the last."""
        if self._source.roles[name] == "head" and self._path:
            return len(self._blocks)
        match = re.match(rf"(?:.+\.)?{re.escape(self._path)}\.(\d+)\.", name) if self._path else None
        return int(match[1]) if match else 0

    def _begin_at(self, block: int) -> None:
        """Let all runs from now on begin at a block; the first one has the embedding before it."""
        if block == self._at:
            return
        with _recorded(self._blocks, block - 1) as outputs:
            self._run()
        for one in self._blocks:
            one.__dict__.pop("forward", None)
        for one in self._blocks[:block]:
            one.forward = lambda *_, **__: outputs[0]
        self._at = block

    def _run(self) -> Tensor:
        text = self._text
        if self._source.task != GENERATION:
            said: Tensor = self._model(text.ids, text.mask)
            return said
        logits: Tensor = self._model(input_ids=text.ids, use_cache=False).logits
        return logits.to(torch.float32)

    def _log_probabilities(self, said: Tensor) -> Tensor:
        return said if self._source.task == EMBEDDING else said.log_softmax(-1)

    def _distance(self, said: Tensor) -> float:
        if self._source.task == EMBEDDING:
            return (1 - F.cosine_similarity(self._said, said, dim=-1)).mean().item()
        kl = torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in zip(self._said, said, strict=True)])
        if kl.shape != self._text.mask.shape:
            return kl.mean().item()
        return (kl * self._text.mask).sum().item() / int(self._text.mask.sum())


def _switched(source: Checkpoint, replaced: Mapping[str, Tensor]) -> Checkpoint:
    """Return a checkpoint whose matrices have the values of ``replaced`` while they are in it."""

    def switch(name: str, weight: Weight) -> Weight:
        if not isinstance(weight, Dense) or len(weight.shape) < 2:
            return weight
        return Dense(
            weight.shape, weight.dtype, lambda: replaced[name] if name in replaced else weight.load()
        )

    return source.with_weights({name: switch(name, weight) for name, weight in source.weights.items()})


def _blocks_of(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return path and modules of the longest numbered list; no path where blocks are not run one after the other."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    path = max(lists, key=lambda path: len(lists[path]), default="")
    beside = [other for other in lists if other.rpartition(".")[0] == path.rpartition(".")[0]]
    if len(beside) != 1:
        return "", []
    return path.removeprefix("model."), list(lists[path])


@contextmanager
def _called(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Fill the list with the indices of the blocks as they are called."""
    order: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, at=at: order.append(at)) for at, block in enumerate(blocks)
    ]
    try:
        yield order
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _recorded(blocks: Sequence[nn.Module], index: int) -> Iterator[list[Any]]:
    """Fill the list with what a block returns."""
    outputs: list[Any] = []
    if index < 0:
        yield outputs
        return
    hook = blocks[index].register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def _key(identity: str, text: Text) -> str:
    follows_from = [__version__, identity, text.ids.tolist(), text.mask.tolist()]
    return hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()


class _Record:
    """What has been measured, a line each, in a file of the cache folder."""

    def __init__(self, key: str) -> None:
        self._path = cache_folder() / "sensitivity" / f"{key[:32]}.jsonl"

    def read(self) -> Iterator[tuple[str, Choice, float]]:
        """Yield what is there; a line that was cut short by a dying machine is not."""
        if not self._path.exists():
            return
        for line in self._path.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
                yield entry["name"], Choice(entry["bits"], entry["group"]), float(entry["cost"])
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, name: str, choice: Choice, cost: float) -> None:
        """Write a measurement down."""
        line = json.dumps({"name": name, "bits": choice.bits, "group": choice.group, "cost": cost})
        with machine_errors("keep a measurement", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
