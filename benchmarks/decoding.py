"""How fast ExecuTorch programs prefill and decode on this machine, side by side, and what memory they take.

    python benchmarks/decoding.py OURS.pte PEER.pte ...

Every program is open in a process of its own; rounds alternate between them, so that what disturbs the machine
disturbs all. Medians over the rounds, with the range; ratios to the last program named. A token that is decoded needs
every weight once, so decoding cannot be faster than the machine reads memory, which is measured too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slm_export.latency import usable_cores
from slm_export.memory import peak_resident_mb, resident_mb
from slm_export.registry import exporter
from slm_export.tasks import GENERATION

PROMPT, DECODED, ROUNDS = 128, 32, 7


@dataclass(frozen=True)
class Speed:
    """Of one program: rounds of tokens per second; memory in MiB."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    load_s: float
    peak_mib: float


class _Child:
    def __init__(self, path: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--child", str(path), "--threads", str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.load_s = float(self._answer()["load_s"])

    def round(self) -> dict[str, float]:
        assert self._process.stdin
        print("round", file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"the process that measures died: {self._process.args!r}")


def serve(path: Path, threads: int) -> None:
    """Measure a round for every line of stdin."""
    runtime = exporter("executorch")
    runtime.set_threads(threads)
    before, began = resident_mb(), time.perf_counter()
    session: Any = runtime.open(path, GENERATION)
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        session.logits([1] * PROMPT, 0)
        middle = time.perf_counter()
        for at in range(DECODED):
            session.logits([1], PROMPT + at)
        ended = time.perf_counter()
        speed = {"prefill": PROMPT / (middle - began), "decode": DECODED / (ended - middle)}
        print(json.dumps({**speed, "peak_mib": peak_resident_mb() - before}), flush=True)


def compare(paths: list[Path], threads: int) -> list[Speed]:
    """Return the speed of every program; the first round warms up and is not counted."""
    children = [_Child(path, threads) for path in paths]
    rounds = [[child.round() for child in children] for _ in range(ROUNDS + 1)][1:]
    for child in children:
        child.close()
    return [
        Speed(
            tuple(answers[i]["prefill"] for answers in rounds),
            tuple(answers[i]["decode"] for answers in rounds),
            child.load_s,
            rounds[-1][i]["peak_mib"],
        )
        for i, child in enumerate(children)
    ]


def read_bandwidth(threads: int) -> float:
    """Return bytes per second that this machine reads: the best of some sums over 1 GiB."""
    torch.set_num_threads(threads)
    values = torch.ones(1 << 28)
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - began)
    return values.nbytes / best


def main() -> None:
    """Print a row per program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve(arguments.child, arguments.threads)
        return
    speeds = compare(arguments.programs, arguments.threads)
    table = Table(
        "program", "MB", f"prefill {PROMPT} tok/s", "decode tok/s", "load s", "peak MiB of the model"
    )
    for path, speed in zip(arguments.programs, speeds, strict=True):
        shown = [f"{median(x):.1f} ({min(x):.1f}..{max(x):.1f})" for x in (speed.prefill, speed.decode)]
        table.add_row(
            str(path),
            f"{path.stat().st_size / 1e6:.1f}",
            *shown,
            f"{speed.load_s:.2f}",
            f"{speed.peak_mib:.0f}",
        )
    console = Console(width=130)
    console.print(
        f"{arguments.threads} threads, {ROUNDS} rounds, context positions {PROMPT} to {PROMPT + DECODED}"
    )
    console.print(table)
    console.print(f"this machine reads {read_bandwidth(arguments.threads) / 1e9:.1f} GB/s")
    last = speeds[-1]
    for path, speed in zip(arguments.programs[:-1], speeds, strict=False):
        console.print(
            f"{path} to {arguments.programs[-1]}: prefill {median(speed.prefill) / median(last.prefill):.3f}, "
            f"decode {median(speed.decode) / median(last.decode):.3f}, "
            f"memory {speed.peak_mib / last.peak_mib:.3f}"
        )


if __name__ == "__main__":
    main()
