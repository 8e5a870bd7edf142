"""How fast artifacts read and write on this machine, side by side, and how fast the machine reads memory.

    python benchmarks/decoding.py OURS.pte PEER.pte
    python benchmarks/decoding.py OURS.litertlm PEER.litertlm --runs 3
    python benchmarks/decoding.py OURS/onnx PEER --threads 1

The measuring is that of ``slm-export bench OURS --compare PEER``. A token that is decoded needs every weight once, so
decoding cannot be faster than the machine reads memory, which is measured beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from slm_export.bench.host import measure_here
from slm_export.bench.show import print_measurements
from slm_export.bench.subject import find_subject
from slm_export.bench.workload import Workload
from slm_export.latency import usable_cores
from slm_export.progress import Progress

PROMPT, RUNS = 128, 7


def read_bandwidth(threads: int) -> float:
    """Return bytes per second that this machine reads: the best of some sums over 1 GiB."""
    torch.set_num_threads(threads)
    values = torch.ones(1 << 28)
    best = float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - began)
    return values.nbytes / best


def main() -> None:
    """Print a column per artifact."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    subjects = [find_subject(path) for path in arguments.artifacts]
    workload = Workload(arguments.threads, arguments.runs, prefill=(PROMPT,), depth=(PROMPT,))
    console = Console()
    print_measurements(console, measure_here(subjects, workload, Progress()))
    console.print(f"this machine reads {read_bandwidth(arguments.threads) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
