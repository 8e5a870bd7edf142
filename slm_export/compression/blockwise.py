"""A model walked block by block, on text: what calibrated passes measure, replace and learn from.

    walk = Walk(checkpoint, windows, folder)
    for block in walk:
        for stage in block.stages: measure block.gram(stage[0]), then block.replace(name, weight)

Every block is given what the blocks before it, as they were left, make of the text (as in Frantar et al., "GPTQ",
2022). The hidden states of all windows lie in files that are mapped: memory holds one block and one batch. A walk
that was killed begins again at the first block that it had not left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.compression.blocks import (
    Call,
    CannotWalk,
    LiveDialect,
    LiveLinear,
    checkpoint_path,
    find_blocks,
    linears_of,
    record_calls,
    run_model,
    stages_of,
    stopping_at,
    tensors_alike,
)
from slm_export.graph.model import build_reference
from slm_export.weights import Weight

BATCH = 1024
"""Tokens that go through a block at a time."""
_COLUMNS = 1024
"""Of second moments that are added to at once: half of them, as they are symmetric, are those of the other half."""
_LIVE, _SOURCE = "live", "source"


@dataclass(frozen=True)
class Batch:
    """Windows of one length, (windows, tokens) int64, and where their hidden states lie in the file."""

    ids: Tensor
    start: int
    """In tokens."""

    @property
    def shape(self) -> tuple[int, int]:
        """Windows, and tokens of each."""
        return self.ids.shape[0], self.ids.shape[1]


class States:
    """Hidden states of all windows, float32 (tokens, width), in a mapped file."""

    def __init__(self, path: Path, tokens: int, width: int) -> None:
        self.values = torch.from_file(str(path), shared=True, size=tokens * width).view(tokens, width)

    def read(self, batch: Batch) -> Tensor:
        """Return the states of a batch (windows, tokens, width)."""
        rows, length = batch.shape
        return self.values[batch.start : batch.start + rows * length].view(rows, length, -1)


@dataclass
class Block:
    """One block at work: its matrices are in memory, its inputs in a file."""

    index: int
    path: str
    """In the names of the checkpoint: model.layers.3"""
    module: nn.Module
    linears: Mapping[str, LiveLinear]
    """By parameter name."""
    stages: tuple[tuple[str, ...], ...]
    """Names of linear layers in the order of their use; those that are given the same tensor are one stage."""
    batches: Sequence[Batch]
    calls: Mapping[tuple[int, int], Call]
    inputs: States
    targets: States | None = None
    """What the block of the model as it came makes of that model's own hidden states; if the walk was asked for it."""

    def run(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Return what the block makes of a batch's inputs, or of those given, (windows, tokens, width)."""
        return self.calls[batch.shape](self.module, self.inputs.read(batch) if hidden is None else hidden)

    def replace(self, name: str, weight: Weight) -> None:
        """Put another weight in the place of a matrix."""
        self.linears[name].matrix = weight.float32()

    @torch.no_grad()
    def gram(self, name: str) -> Tensor:
        """Return the mean of x x^T over the inputs x of a linear layer, float32 (in, in).

        What comes before that layer in the block is run as it stands now, what comes after it is not run.
        """
        width = self.linears[name].in_features
        total, tokens = torch.zeros(width, width), 0
        with stopping_at(self.linears[name]) as run:
            for batch in self.batches:
                x = run(lambda batch=batch: self.run(batch)).flatten(0, -2)  # type: ignore[misc]
                for start in range(0, width, _COLUMNS):
                    part = x[:, start : start + _COLUMNS]
                    total[start : start + _COLUMNS, start:].addmm_(part.t(), x[:, start:])
                tokens += x.shape[0]
        return total.triu_().add_(total.triu(1).t()).div_(tokens)


class Walk:
    """The blocks of a model in their order; what is put into one while it is at work makes the inputs of the next.

    Given   windows: token ids
            folder: for the hidden states. A walk over one that an earlier walk left goes on where that one stopped
            targets: whether blocks are to know what the model as it came makes of the text: twice the work
    Raises:
        CannotWalk: the model is no sequence of blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Iterable[Sequence[int]],
        folder: Path,
        *,
        targets: bool = False,
        advance: Callable[[int, str], None] = lambda count, what: None,
    ) -> None:
        self._model = build_reference(checkpoint, dialect=LiveDialect())
        self._batches, self._folder, self._advance = _batches(windows), folder, advance
        self._kinds = (_LIVE, _SOURCE) if targets else (_LIVE,)
        self._path, self._blocks = find_blocks(self._model)
        self._calls: list[dict[tuple[int, int], Call]] = [{} for _ in self._blocks]
        for batch in {batch.shape: batch for batch in self._batches}.values():
            recorded = record_calls(self._model, self._blocks, batch.ids)
            for calls, call in zip(self._calls, recorded, strict=True):
                calls[batch.shape] = call
        other = record_calls(self._model, self._blocks, batch.ids.flip(1))
        if not tensors_alike(recorded, other):
            raise CannotWalk("what its blocks are given beside the hidden states depends on the text")
        self._first = self._last_left()

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the matrices of blocks that an earlier walk over this folder left."""
        return tuple(name for index in range(self._first) for name in self._linears(index))

    def __iter__(self) -> Iterator[Block]:
        """Yield each block that is not finished."""
        if self._first == 0:
            self._write_embedded()
        for index in range(self._first, len(self._blocks)):
            self._advance(0, f"block {index + 1} of {len(self._blocks)}")
            block = self._enter(index)
            yield block
            self._leave(block)
            self._advance(1, f"block {index + 1} of {len(self._blocks)}")

    def forget(self) -> None:
        """Remove the hidden states: a walk over this folder begins at the first block."""
        for path in self._folder.glob("hidden-*"):
            path.unlink()
        self._first = 0

    def _last_left(self) -> int:
        """Return the last block whose inputs are there."""
        there = [
            i for i in range(len(self._blocks) + 1) if all(self._file(i, k).exists() for k in self._kinds)
        ]
        return there[-1] if there else 0

    def _write_embedded(self) -> None:
        if self._file(0, _LIVE).exists():
            return
        states: States | None = None
        with torch.no_grad(), stopping_at(self._blocks[0]) as run:
            for batch in self._batches:
                hidden = run(lambda batch=batch: run_model(self._model, batch.ids))  # type: ignore[misc]
                states = states or self._states(self._part(0, _LIVE), hidden.shape[-1])
                states.read(batch).copy_(hidden)
        if _SOURCE in self._kinds:
            shutil.copyfile(self._part(0, _LIVE), self._file(0, _SOURCE))
        os.replace(self._part(0, _LIVE), self._file(0, _LIVE))

    def _enter(self, index: int) -> Block:
        linears = self._linears(index)
        for linear in linears.values():
            linear.matrix = linear.source.float32()
        block = Block(
            index=index,
            path=checkpoint_path(self._model, f"{self._path}.{index}"),
            module=self._blocks[index],
            linears=linears,
            stages=(),
            batches=self._batches,
            calls=self._calls[index],
            inputs=self._states(self._file(index, _LIVE)),
        )
        block.stages = stages_of(lambda: block.run(self._batches[0]), linears)
        if _SOURCE in self._kinds:
            block.targets = self._through(block, _SOURCE)
        return block

    @torch.no_grad()
    def _through(self, block: Block, kind: str) -> States:
        """Write what the block, as it is now, makes of one of the streams."""
        inputs, made = self._states(self._file(block.index, kind)), self._file(block.index + 1, kind)
        if not made.exists():
            part = self._part(block.index + 1, kind)
            outputs: States | None = None
            for batch in self._batches:
                hidden = block.run(batch, inputs.read(batch))
                outputs = outputs or self._states(part, hidden.shape[-1])
                outputs.read(batch).copy_(hidden)
            os.replace(part, made)
        return self._states(made)

    def _leave(self, block: Block) -> None:
        self._through(block, _LIVE)
        for linear in block.linears.values():
            linear.matrix = None
        for kind in self._kinds:
            self._file(block.index, kind).unlink(missing_ok=True)

    def _linears(self, index: int) -> dict[str, LiveLinear]:
        return linears_of(self._model, f"{self._path}.{index}")

    def _states(self, path: Path, width: int | None = None) -> States:
        tokens = sum(batch.ids.numel() for batch in self._batches)
        return States(path, tokens, path.stat().st_size // tokens // 4 if width is None else width)

    def _file(self, index: int, kind: str) -> Path:
        """Return the file of the hidden states before a block; it appears when it is whole."""
        return self._folder / f"hidden-{index:04}-{kind}"

    def _part(self, index: int, kind: str) -> Path:
        path = self._file(index, kind)
        return path.with_name(f"{path.name}.part")


def _batches(windows: Iterable[Sequence[int]]) -> tuple[Batch, ...]:
    """Return the windows in batches of equal lengths, long ones first."""
    batches, start = [], 0
    for length, alike in groupby(sorted(windows, key=len, reverse=True), len):
        ids = torch.tensor(list(alike))
        for part in torch.split(ids, max(1, BATCH // length)):
            batches.append(Batch(part, start))
            start += part.numel()
    return tuple(batches)
