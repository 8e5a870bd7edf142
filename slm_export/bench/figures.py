"""What was measured, as frozen values; a figure that was not measured is None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from slm_export.bench.workload import Turn, Workload


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one figure, in the order of the runs."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of some values; None of none."""
        found = tuple(values)
        return cls(median(found), min(found), max(found), found) if found else None


@dataclass(frozen=True)
class Spoken:
    """One turn as it went; seconds."""

    turn: Turn
    prefill_s: float | None
    decode_s: float | None
    load_ms: float | None = None
    read: int | None = None
    """Tokens of the prompt, where the runner counts them itself."""
    wrote: int | None = None


@dataclass(frozen=True)
class Speed:
    """At one length: of a prompt, of a context in which tokens are generated, or of an encoder's input."""

    tokens: int
    tokens_per_s: Spread | None
    ms: Spread | None
    """Of the whole prompt (the time to the first token), of one generated token, or of one call."""


@dataclass(frozen=True)
class Instant:
    """One turn of a sustained run."""

    at_s: float
    """When it ended, since the beginning."""
    tokens_per_s: float
    temperature_c: float | None = None
    """The hottest sensor of the processor, as far as the system tells."""
    throttling: str | None = None
    """What the system itself says of throttling."""


@dataclass(frozen=True)
class Conditions:
    """The state of a device before or after measuring, from its own interfaces."""

    temperature_c: float | None = None
    throttling: str | None = None
    available_mb: float | None = None


@dataclass(frozen=True)
class Measurement:
    """Everything that was found of one artifact in one place."""

    name: str
    format: str
    bytes: int
    runtime: str
    where: str
    threads: int
    runs: int
    context: int
    generates: bool
    cold_load_ms: Spread | None = None
    """From the disk: nothing of the file was in memory, which the system confirmed."""
    warm_load_ms: Spread | None = None
    prefill: tuple[Speed, ...] = ()
    """Of an encoder: one call at each length."""
    decode: tuple[Speed, ...] = ()
    peak_rss_mb: float | None = None
    """Of the whole process, MiB."""
    model_rss_mb: float | None = None
    """Above what the process held before the artifact was loaded, MiB."""
    sustained: tuple[Instant, ...] = ()
    before: Conditions = field(default_factory=Conditions)
    after: Conditions = field(default_factory=Conditions)
    notes: tuple[str, ...] = ()


def speeds(
    rounds: Sequence[Sequence[Spoken]], workload: Workload
) -> tuple[tuple[Speed, ...], tuple[Speed, ...]]:
    """Return prefill and decode by length, from rounds of the same turns."""
    prefill, decode = [], []
    for at_length in zip(*rounds, strict=True):
        tokens, generated = at_length[0].turn.prompt, at_length[0].turn.generated
        if workload.wants_prefill(tokens) or not generated:
            read = [(s.read or tokens, s.prefill_s) for s in at_length if s.prefill_s]
            rates, times = [count / took for count, took in read], [1000 * took for _, took in read]
            prefill.append(Speed(tokens, Spread.of(rates), Spread.of(times)))
        depth = workload.depth_of(tokens)
        if generated and depth is not None:
            wrote = [(s.wrote or generated, s.decode_s) for s in at_length if s.decode_s]
            rates, times = [count / took for count, took in wrote], [1000 * took / n for n, took in wrote]
            decode.append(Speed(depth, Spread.of(rates), Spread.of(times)))
    return tuple(prefill), tuple(decode)


def ratios(mine: Measurement, other: Measurement) -> Mapping[str, Spread]:
    """Return what of ``mine`` is how many times that of ``other``: of runs that followed each other, run by run."""
    pairs: dict[str, tuple[Spread | None, Spread | None]] = {
        "cold load": (mine.cold_load_ms, other.cold_load_ms),
        "warm load": (mine.warm_load_ms, other.warm_load_ms),
    }
    for kind in ("prefill", "decode"):
        theirs = {speed.tokens: speed.tokens_per_s for speed in getattr(other, kind)}
        for speed in getattr(mine, kind):
            pairs[f"{kind} {speed.tokens}"] = (speed.tokens_per_s, theirs.get(speed.tokens))
    for name in ("bytes", "peak_rss_mb", "model_rss_mb"):
        pairs[name] = (_single(getattr(mine, name)), _single(getattr(other, name)))
    found = {name: _ratio(*pair) for name, pair in pairs.items()}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _single(value: float | None) -> Spread | None:
    return Spread.of([] if value is None else [value])


def _ratio(mine: Spread | None, other: Spread | None) -> Spread | None:
    if mine is None or other is None or len(mine.values) != len(other.values) or 0 in other.values:
        return None
    return Spread.of(a / b for a, b in zip(mine.values, other.values, strict=True))
