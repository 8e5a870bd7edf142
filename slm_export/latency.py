"""How fast an artifact is on this machine, measured in a child process of its own.

A child, because the parent has torch, the source model and a compiler in memory, which an app has not; and
because a crash there is a result here, not the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from slm_export.child import call, serve
from slm_export.results import EncoderLatency, Latency, TokenLatency
from slm_export.source.tasks import GENERATION

if TYPE_CHECKING:
    from slm_export.runtime import DecoderSession, EncoderSession

RUNS = 5
PROMPT_TOKENS = 128
DECODE_TOKENS = 64
ENCODER_RUNS = 50


def measure(path: Path, format: str, task: str, threads: int | None = None) -> Latency:
    """Measure an artifact with the exporter's own runtime; ``threads``: as many as there are cores.

    Raises:
        MachineError: the child died, or did not answer within half an hour.
    """
    request = {"path": str(path), "format": format, "task": task, "threads": threads or usable_cores()}
    figures = call("slm_export.latency", request, f"measure {path.name}")
    return TokenLatency(**figures) if task == GENERATION else EncoderLatency(**figures)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure_here(request: dict[str, Any]) -> dict[str, Any]:
    from slm_export.memory import peak_resident_mb, resident_mb
    from slm_export.registry import exporter

    runtime = exporter(request["format"])
    runtime.set_threads(request["threads"])
    before = resident_mb()
    began = time.perf_counter()
    session: Any = runtime.open(Path(request["path"]), request["task"])
    load_ms = 1000 * (time.perf_counter() - began)
    steps = _time_decoder if request["task"] == GENERATION else _time_encoder
    figures = steps(session)
    peak = peak_resident_mb()
    return {
        "where": "host CPU",
        "threads": request["threads"],
        "load_ms": load_ms,
        **figures,
        "peak_rss_mb": peak,
        "model_rss_mb": peak - before,
    }


def _time_decoder(session: DecoderSession) -> dict[str, Any]:
    """Time prompts and single steps; the first round warms up and is not counted."""
    prompt_tokens = min(PROMPT_TOKENS, session.prefill_chunk, session.context // 2)
    decode_tokens = min(DECODE_TOKENS, session.context - prompt_tokens)
    turns = [timed_turn(session, prompt_tokens, decode_tokens) for _ in range(RUNS + 1)]
    prefill, decode = [turn[0] for turn in turns], [turn[1] for turn in turns]
    return {
        "runs": RUNS,
        "prefill_tokens": prompt_tokens,
        "time_to_first_token_ms": 1000 * median(prefill[1:]),
        "prefill_tokens_per_s": prompt_tokens / median(prefill[1:]),
        "decode_tokens_per_s": decode_tokens / median(decode[1:]),
    }


def _time_encoder(session: EncoderSession) -> dict[str, Any]:
    tokens = min(PROMPT_TOKENS, session.context)
    ids, mask = [1] * tokens, [1] * tokens
    times = sorted([seconds_of(lambda: session.outputs(ids, mask)) for _ in range(ENCODER_RUNS + 5)][5:])
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    at = {name: times[min(ENCODER_RUNS - 1, int(share * ENCODER_RUNS))] for name, share in shares.items()}
    return {
        "runs": ENCODER_RUNS,
        "tokens": tokens,
        "latency_ms": {name: 1000 * value for name, value in at.items()},
    }


def timed_turn(session: DecoderSession, prompt: int, generated: int) -> tuple[float, float]:
    """Read a prompt into an empty context, then generate; return the seconds of both."""
    read = seconds_of(lambda: session.logits([1] * prompt, 0))
    began = time.perf_counter()
    for at in range(generated):
        session.logits([1], prompt + at)
    return read, time.perf_counter() - began


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    serve(_measure_here)
