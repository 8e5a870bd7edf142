"""What an allocation takes: bytes of a file, memory of a process, time of a token.

Codes and scales are counted as each format stores them; the program around them, and what a runtime needs beside
the weights, are first guesses from artifacts of this project (docs/compression.md), and are replaced by what is
measured as soon as something has been.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from slm_export.budget.choices import Allocation, Choice, Options
from slm_export.checkpoint import Checkpoint
from slm_export.graph.layers import CannotStamp, layers_of
from slm_export.planning.formats import FORMATS as FORMATS
from slm_export.planning.formats import matrix_bytes
from slm_export.source.tasks import GENERATION

_SWEEP = 256 << 20  # bytes, far beyond any cache
Bytes = dict[str, dict[Choice, float]]


def encoded(checkpoint: Checkpoint, options: Options, format: str) -> Bytes:
    """Return what each choice of each matrix takes in a file of a format."""
    known = FORMATS[format]
    tied = set(checkpoint.tied.values())

    def of(name: str, choice: Choice) -> float:
        shape, looked_up = checkpoint.weights[name].shape, checkpoint.roles[name] in ("embedding", "table")
        return matrix_bytes(known, shape, choice.bits, choice.group, looked_up=looked_up, tied=name in tied)

    return {name: {choice: of(name, choice) for choice in choices} for name, choices in options.items()}


def program_bytes(checkpoint: Checkpoint, options: Options, format: str) -> float:
    """Return a first guess of what a file holds beside the matrices that are chosen for."""
    known = FORMATS[format]
    rest = sum(
        known.vector * weight.count if len(weight.shape) < 2 else weight.bytes
        for name, weight in checkpoint.weights.items()
        if name not in options
    )
    tokenizer = checkpoint.folder / "tokenizer.json"
    carries = known.tokenizer and checkpoint.task == GENERATION and tokenizer.is_file()
    carried = len(zlib.compress(tokenizer.read_bytes())) if carries else 0
    return rest + known.program + known.block * blocks(checkpoint) + carried


def blocks(checkpoint: Checkpoint) -> int:
    """Return how many blocks a model has; a guess where they are not alike."""
    try:
        return layers_of(checkpoint).count
    except CannotStamp:
        return int(getattr(checkpoint.config.get_text_config(), "num_hidden_layers", 0))


def read_per_token(checkpoint: Checkpoint, options: Options) -> Bytes:
    """Return the bytes of each choice that are read for every token: of a table that is looked up, next to nothing."""
    tied = set(checkpoint.tied.values())

    def read(name: str) -> bool:
        return checkpoint.roles[name] in ("linear", "head") or name in tied

    return {
        name: {c: float(c.bytes(checkpoint.weights[name].shape)) if read(name) else 0.0 for c in choices}
        for name, choices in options.items()
    }


def total(takes: Mapping[str, Mapping[Choice, float]], allocation: Allocation) -> float:
    """Return what an allocation takes."""
    return sum(takes[name][choice] for name, choice in allocation.items())


@dataclass(frozen=True)
class Speed:
    """Seconds of a token: some that no allocation changes, and those of reading weights."""

    bytes_per_s: float
    fixed_s: float = 0.0

    def tokens_per_s(self, bytes_read: float) -> float:
        """Return the rate of decoding."""
        return 1 / (self.fixed_s + bytes_read / self.bytes_per_s)

    def most_bytes(self, tokens_per_s: float) -> float:
        """Return how much may be read per token; negative where nothing would be little enough."""
        return (1 / tokens_per_s - self.fixed_s) * self.bytes_per_s

    def corrected(self, tokens_per_s: float, bytes_read: float) -> Speed:
        """Return the speed that has been measured for some bytes."""
        rest = 1 / tokens_per_s - bytes_read / self.bytes_per_s
        if rest >= 0:
            return replace(self, fixed_s=rest)
        return Speed(bytes_read * tokens_per_s)


def host_bandwidth() -> float:
    """Return how many bytes per second this machine reads from memory, on all its cores."""
    values = torch.ones(_SWEEP >> 2)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - began)
    return _SWEEP / min(seconds)
