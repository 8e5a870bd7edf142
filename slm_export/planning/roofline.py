"""How long a call takes: the roofline of Williams, Waterman and Patterson (2009), one for each class of operator.

A class (float, int8, int4) moves its weights at a share of the machine's bandwidth and multiplies at a number of
multiply-adds per cycle of a core; it takes the longer of the two. Attention moves the KV cache, and each layer costs
an overhead per call. The shares, rates and overheads are those of `data/roofline.json`, which benchmarks/calibrate.py
fits on measurements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from slm_export.planning.model import ModelShape
from slm_export.planning.storage import Stored

KINDS = ("int4", "int8", "float")


@dataclass(frozen=True)
class Constants:
    """What was fitted for a runtime. A class that no measurement tells of is absent."""

    share: Mapping[str, float]
    """Class -> the share of the machine's bandwidth that its kernels reach."""
    per_cycle: Mapping[str, float]
    """Class -> multiply-adds per cycle of one core."""
    layer_s: float
    """Seconds of a layer in a call, beside its weights."""
    load_share: float | None = None
    """Bytes of a file that are opened per second, as a share of the machine's bandwidth; None where not measured."""


@dataclass(frozen=True)
class Machine:
    """What the model knows of a machine; None where it is not known."""

    name: str
    bytes_per_s: float | None
    cycles_per_s: float | None
    """Of all cores that a runtime uses, together."""
    source: str


@dataclass(frozen=True)
class Work:
    """One call: what it moves and multiplies, by class of operator."""

    name: str
    tokens: int
    bytes: Mapping[str, float]
    """Of weights."""
    multiply_adds: Mapping[str, float]
    kv_bytes: float
    layers: int

    @property
    def total_bytes(self) -> float:
        """All that is moved."""
        return sum(self.bytes.values()) + self.kv_bytes

    @property
    def operations(self) -> float:
        """Multiplications and additions, each one operation."""
        return 2 * sum(self.multiply_adds.values())


def work_of(
    model: ModelShape, stored: Sequence[Stored], tokens: int, depth: int, kv_value_bytes: int
) -> Work:
    """Return a call of so many tokens behind ``depth`` others; of a decoder, the logits of the last alone.

    Given   kv_value_bytes: of one value in the KV cache
    """
    moved: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    multiplied = dict(moved)
    for one in stored:
        role, head = one.matrix.role, one.matrix.role == "head"
        looked_up = role in ("embedding", "table")
        if looked_up and not (model.tied and role == "embedding"):
            continue
        once = model.decodes and (head or looked_up)
        times = model.repeats if role == "linear" else 1.0
        moved[one.kind] += one.packed_bytes * times
        multiplied[one.kind] += one.matrix.count * times * (1 if once else tokens)
    name = f"{'prefill' if model.decodes else 'call'} of {tokens} tokens"
    if model.decodes and tokens == 1:
        name = "decode"
    cache = model.kv_values * kv_value_bytes * (depth + tokens)
    return Work(name, tokens, moved, multiplied, cache, model.layers)


def seconds(work: Work, machine: Machine, constants: Constants) -> float | None:
    """Return how long a call takes; None where a figure that decides is not known."""
    if machine.bytes_per_s is None:
        return None
    total = constants.layer_s * work.layers
    for kind, moved in work.bytes.items():
        if not moved:
            continue
        share = constants.share.get(kind)
        if share is None:
            return None
        by_memory = moved / (share * machine.bytes_per_s)
        by_cores = _compute_seconds(work, kind, machine, constants)
        if by_cores is None and work.tokens > 1:
            return None
        total += max(by_memory, by_cores or 0.0)
    return total + work.kv_bytes / machine.bytes_per_s


def _compute_seconds(work: Work, kind: str, machine: Machine, constants: Constants) -> float | None:
    rate = constants.per_cycle.get(kind)
    if rate is None or machine.cycles_per_s is None:
        return None
    return work.multiply_adds[kind] / (rate * machine.cycles_per_s)


@lru_cache(maxsize=1)
def fitted() -> Mapping[str, Mapping[str, Constants]]:
    """Return machine class ("device" or "host") -> format -> constants."""
    text = resources.files("slm_export").joinpath("data/roofline.json").read_text("utf-8")
    return {
        where: {format: Constants(**of) for format, of in formats.items()}
        for where, formats in json.loads(text).items()
        if where in ("device", "host")
    }
