"""What a teacher says of a batch: asked live, or read from disk where it was written down once.

On disk are the k largest probabilities of every token of every example, with the ids, compressed: for a vocabulary of
100,000 and k = 32 about a thousandth of all logits. What is not among them is one choice more, "anything else".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slm_export.learning.evaluation import batches
from slm_export.learning.processes import rank, wait_for_all
from slm_export.learning.trainer import Batch, Example
from slm_export.machine import machine_errors
from slm_export.progress import Progress

_SHARD = 64
"""Examples in one file."""

Values = npt.NDArray[Any]


class Teacher(Protocol):
    """Says what a student is held against."""

    def targets(self, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores of teacher and student over the same choices, float32 (examples, tokens, choices).

        Given   logits: the student's, float32 (examples, tokens, vocabulary)
        """


class LiveTeacher:
    """A decoder that is asked at every step."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module.eval().requires_grad_(False)

    def targets(self, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits, and the student's as they are; a padded table of either is cut."""
        if next(self._module.parameters()).device != logits.device:
            self._module.to(logits.device)
        # The student's logits keep their gradient: no further than this.
        with torch.no_grad():
            ours = self._module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        width = min(ours.shape[-1], logits.shape[-1])
        return ours[..., :width].float(), logits[..., :width]


class WrittenTeacher:
    """What a teacher said once, of examples that carry their number under ``example``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._heads: dict[int, _Head] = {}

    def targets(self, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the k choices and of all others together."""
        rows = [self._example(int(number)) for number in batch["example"]]
        length, k = logits.shape[1], rows[0][0].shape[1]
        ids = torch.zeros(len(rows), length, k, dtype=torch.int64)
        ours = torch.full((len(rows), length, k), -math.log(2 * k))  # of padding, which is not looked at
        for row, (chosen, values) in enumerate(rows):
            ids[row, : len(chosen)], ours[row, : len(chosen)] = chosen, values
        ids, ours = ids.to(logits.device), ours.to(logits.device)
        return with_rest(ours), with_rest(logits.log_softmax(-1).gather(-1, ids))

    def _example(self, number: int) -> tuple[Tensor, Tensor]:
        shard, index = divmod(number, _SHARD)
        path = self._folder / _name(shard)
        if shard not in self._heads:
            self._heads[shard] = _head(path)
        return _read(path, self._heads[shard], index)


def with_rest(values: Tensor) -> Tensor:
    """Return log-probabilities with one more: of everything that is not among them."""
    rest = 1 - values.exp().sum(-1, keepdim=True)
    return torch.cat((values, rest.clamp_min(1e-6).log()), -1)


@torch.no_grad()
def write_down(
    module: nn.Module, examples: Sequence[Example], k: int, pad_id: int, folder: Path, progress: Progress
) -> WrittenTeacher:
    """Ask a teacher about every example once; what an earlier run has written is kept.

    Raises:
        MachineError: the disk is full.
    """
    count = -(-len(examples) // _SHARD)
    with (
        progress.stage("write down what the teacher says", total=count) as stage,
        machine_errors("write down what the teacher says", folder),
    ):
        for shard in range(count):
            path = folder / _name(shard)
            if rank() == 0 and not path.is_file():
                _write(path, _asked(module, examples[shard * _SHARD : (shard + 1) * _SHARD], k, pad_id))
            stage.advance(1)
        wait_for_all()
    return WrittenTeacher(folder)


def numbered(examples: Sequence[Example]) -> list[Example]:
    """Return examples that carry their number, by which a written teacher finds them."""
    return [{**example, "example": [number]} for number, example in enumerate(examples)]


def examples_sha256(examples: Sequence[Example]) -> str:
    """Return the hash of the token ids."""
    return hashlib.sha256(json.dumps([list(e["input_ids"]) for e in examples]).encode()).hexdigest()


def _asked(
    module: nn.Module, examples: Sequence[Example], k: int, pad_id: int
) -> list[tuple[Values, Values]]:
    made = []
    device = next(module.parameters()).device
    for batch in batches(examples, pad_id, 8):
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        top = module(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1).topk(k, dim=-1)
        for row, length in enumerate(mask.sum(1).tolist()):
            chosen = top.indices[row, :length].cpu().numpy().astype(np.uint32)
            made.append((chosen, top.values[row, :length].cpu().numpy().astype(np.float16)))
    return made


def _name(shard: int) -> str:
    return f"{shard:06d}.top"


@dataclass(frozen=True)
class _Head:
    """The first line of a file, in JSON: where the examples are, each compressed by itself."""

    k: int
    lengths: tuple[int, ...]
    """Tokens of every example."""
    sizes: tuple[int, ...]
    """Bytes of every example."""
    start: int
    """Of the first one in the file."""


def _write(path: Path, rows: Sequence[tuple[Values, Values]]) -> None:
    """Write one file, whole or not at all."""
    packed = [zlib.compress(chosen.tobytes() + values.tobytes(), 6) for chosen, values in rows]
    head = {
        "k": rows[0][0].shape[1],
        "lengths": [len(chosen) for chosen, _ in rows],
        "sizes": [len(each) for each in packed],
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_bytes(json.dumps(head).encode() + b"\n" + b"".join(packed))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _head(path: Path) -> _Head:
    with open(path, "rb") as file:
        line = file.readline()
    shape = json.loads(line)
    return _Head(int(shape["k"]), tuple(shape["lengths"]), tuple(shape["sizes"]), len(line))


def _read(path: Path, head: _Head, index: int) -> tuple[Tensor, Tensor]:
    """Return ids and log-probabilities of one example, (tokens, k)."""
    with open(path, "rb") as file:
        file.seek(head.start + sum(head.sizes[:index]))
        body = zlib.decompress(file.read(head.sizes[index]))
    total = head.lengths[index] * head.k
    chosen = np.frombuffer(body, np.uint32, total).astype(np.int64)
    values = np.frombuffer(body, np.float16, total, offset=4 * total).astype(np.float32)
    return torch.from_numpy(chosen).view(-1, head.k), torch.from_numpy(values).view(-1, head.k)
