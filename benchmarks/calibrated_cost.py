"""What calibrated 4-bit costs in time and memory, and that a killed export repeats no finished block.

    python benchmarks/calibrated_cost.py llama-3.2-1b [--layers N] [--kill-behind BLOCK] [--memory 6]

Random weights in the real geometry; int4 in groups of 32 by `gptq`, embedding in int8, calibrated on 32,768 tokens of
Python's standard library, written for ExecuTorch. Time is that of the whole command, verification left out; memory is
the peak resident set, mapped files included. --memory sets RLIMIT_DATA (GiB), so that an export that needs more fails.
With --kill-behind the export is killed with SIGKILL once that block is finished, started again, and made a third time
without being disturbed: the artifact must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import geometries

sys.path.append(str(Path(__file__).resolve().parent / "quality"))
from heldout import calibration_documents

_SETTINGS = """
model   = "{model}"
target  = "android"
formats = ["executorch"]
context = 2048

[[passes]]
pass           = "gptq"
bits           = 4
group          = 32
embedding_bits = 8
"""
_BLOCK = re.compile(r"block (\d+) of (\d+)")


@dataclass(frozen=True)
class Run:
    """One command, to its end or until it was killed."""

    seconds: float
    peak_mib: float
    blocks: tuple[int, ...]
    """That it worked on, counted from 1."""
    code: int


def main() -> None:
    """Export, and print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("geometry", choices=geometries.GEOMETRIES)
    parser.add_argument("--layers", type=int, help="of so many layers, not of all")
    parser.add_argument("--kill-behind", type=int, metavar="BLOCK")
    parser.add_argument("--memory", type=float, metavar="GIB", help="that the export may take")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = _prepare(arguments.geometry, arguments.layers, Path(work))
        if arguments.kill_behind:
            _print("killed", _export(folder, "resumed", "a", arguments.memory, arguments.kill_behind))
            _print("resumed", _export(folder, "resumed", "a", arguments.memory))
        _print("undisturbed", _export(folder, "whole", "b", arguments.memory))
        print(f"model.pte: {(folder / 'whole/executorch/model.pte').stat().st_size} bytes")
        if arguments.kill_behind:
            same = _hash(folder / "resumed") == _hash(folder / "whole")
            print("the same bytes" if same else "OTHER BYTES")
            sys.exit(not same)


def _prepare(name: str, layers: int | None, work: Path) -> Path:
    if layers:
        kind, options = geometries.GEOMETRIES[name]
        geometries.GEOMETRIES = {name: (kind, {**options, "num_hidden_layers": layers})}
    model = geometries.make(name, work / "model")
    (work / "text.txt").write_text("\f".join(calibration_documents()), encoding="utf-8")
    (work / "slm-export.toml").write_text(_SETTINGS.format(model=model), encoding="utf-8")
    return work


def _export(folder: Path, out: str, cache: str, memory: float | None, kill_behind: int | None = None) -> Run:
    def limit() -> None:
        if memory:
            size = int(memory * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    command = [sys.executable, "-m", "slm_export", "export", "--calibration", "text.txt"]
    command += ["--no-verify", "--no-bench", "--out", out]
    environment = {**os.environ, "SLM_EXPORT_CACHE": str(folder / f"cache-{cache}"), "HF_HUB_OFFLINE": "1"}
    began, blocks, said = time.monotonic(), [], ""
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )
    assert child.stderr
    for line in child.stderr:
        said += line
        if found := _BLOCK.search(line):
            blocks.append(int(found[1]))
            if kill_behind and blocks[-1] > kill_behind:
                child.send_signal(signal.SIGKILL)
                break
    _, status, usage = os.wait4(child.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code and not kill_behind:
        sys.exit(f"exit code {code}\n{said[-3000:]}")
    return Run(time.monotonic() - began, usage.ru_maxrss / 1024, tuple(dict.fromkeys(blocks)), code)


def _print(what: str, run: Run) -> None:
    blocks = f"blocks {run.blocks[0]} to {run.blocks[-1]}" if run.blocks else "no block"
    print(f"{what}: {run.seconds / 60:.1f} min, {run.peak_mib:.0f} MiB at the peak, {blocks}", flush=True)


def _hash(bundle: Path) -> str:
    return hashlib.sha256((bundle / "executorch" / "model.pte").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
