"""LiteRT's programs: ``litert_lm_main`` for decoders, ``benchmark_model`` for the rest.

Flags and output: runtime/engine/litert_lm_advanced_main.cc, shared_flags.cc and io_types.cc of LiteRT-LM;
https://ai.google.dev/edge/litert/next/benchmark for benchmark_model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from slm_export.bench.figures import Spoken
from slm_export.bench.subject import Subject
from slm_export.bench.workload import Turn, Workload
from slm_export.errors import InputError

_CALLS = 20


class LiteRTLMMain:
    """Fills prompts with tokens of its own, so any length can be asked for."""

    program: ClassVar[str] = "litert_lm_advanced_main"
    get: ClassVar[str] = "built from LiteRT-LM's source, //runtime/engine (docs/bench.md has the command)"

    def turns(self, subject: Subject, workload: Workload) -> tuple[Turn, ...]:
        """See `VendorRunner`."""
        if subject.context is None:
            raise InputError(f"{subject.name}: says nothing of its context; give the bundle that it is in")
        return workload.turns(subject.context)

    def files(self, subject: Subject, turns: Sequence[Turn], scratch: Path) -> dict[str, Path]:
        """Nothing more is needed: the tokenizer is in the file."""
        return {}

    def arguments(self, subject: Subject, artifact: str, turn: Turn, threads: int) -> list[str]:
        """See `VendorRunner`."""
        return [
            f"--model_path={artifact}",
            "--backend=cpu",
            "--benchmark",
            f"--benchmark_prefill_tokens={turn.prompt}",
            f"--benchmark_decode_tokens={turn.generated}",
            f"--max_num_tokens={subject.context}",
            f"--num_cpu_threads={threads}",
            "--cache_dir=:memory",
            "--async=false",
        ]

    def parse(self, output: str, turn: Turn) -> Spoken | None:
        """See `VendorRunner`; of several turns the last, and loading is the sum of what it calls init phases."""
        read, wrote = (
            re.findall(rf"{kind} Turn \d+: Processed (\d+) tokens in (\S+) duration", output)
            for kind in ("Prefill", "Decode")
        )
        if not read or not wrote:
            return None
        phases = re.findall(r"^ *- [^:\n]+: ([\d.]+) ms", output, re.MULTILINE)
        return Spoken(
            turn,
            prefill_s=_seconds(read[-1][1]),
            decode_s=_seconds(wrote[-1][1]),
            load_ms=sum(map(float, phases)) if phases else None,
            read=int(read[-1][0]),
            wrote=int(wrote[-1][0]),
        )


class BenchmarkModel:
    """Calls one function of a file again and again, on inputs of its own."""

    program: ClassVar[str] = "benchmark_model"
    get: ClassVar[str] = "prebuilt at https://ai.google.dev/edge/litert/next/benchmark (docs/bench.md)"

    def turns(self, subject: Subject, workload: Workload) -> tuple[Turn, ...]:
        """See `VendorRunner`: the lengths that the file has functions for."""
        lengths = sorted(_functions(subject))
        if not lengths:
            raise InputError(f"{subject.name}: its functions are not known; give the bundle that it is in")
        asked = workload.prefill or tuple(lengths)
        if unknown := [length for length in asked if length not in lengths]:
            known = ", ".join(map(str, lengths))
            raise InputError(f"--prefill {unknown[0]}: the file has functions for {known} tokens")
        return tuple(Turn(length, 0) for length in sorted(asked))

    def files(self, subject: Subject, turns: Sequence[Turn], scratch: Path) -> dict[str, Path]:
        """Nothing more is needed."""
        return {}

    def arguments(self, subject: Subject, artifact: str, turn: Turn, threads: int) -> list[str]:
        """See `VendorRunner`."""
        return [
            f"--graph={artifact}",
            f"--signature_to_run_for={_functions(subject)[turn.prompt]}",
            f"--num_threads={threads}",
            f"--num_runs={_CALLS}",
            "--warmup_runs=3",
        ]

    def parse(self, output: str, turn: Turn) -> Spoken | None:
        """See `VendorRunner`; the mean of one call, in microseconds there."""
        found = re.search(
            r"Inference timings in us: Init: ([\d.e+]+),.*Inference \(avg\): ([\d.e+]+)", output
        )
        return None if found is None else Spoken(turn, float(found[2]) / 1e6, None, float(found[1]) / 1000)


def _functions(subject: Subject) -> dict[int, str]:
    """Return length -> name of a bundle's encoder functions: ``encode_128``."""
    names = [name for name in subject.functions if name.rpartition("_")[2].isdecimal()]
    return {int(name.rpartition("_")[2]): name for name in names}


def _seconds(duration: str) -> float:
    """Return seconds of absl's notation: ``1m2.5s``, ``103.2ms``, ``27us``."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    return sum(
        float(value) * units[unit] for value, unit in re.findall(r"([\d.]+)(h|ms|m|us|ns|s)", duration)
    )
