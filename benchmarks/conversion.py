"""What converting costs, in seconds and memory, by size of the model, by format, and beside the peer of each format.

    python benchmarks/conversion.py llama-3.2-1b --peer
    python benchmarks/conversion.py llama-3.2-1b --format litert --format onnx --peer --peer-python VENV/bin/python
    python benchmarks/conversion.py llama-3.2-1b --format executorch --format litert --format onnx --together
    python benchmarks/conversion.py llama-3.2-1b --format coreml
    python benchmarks/conversion.py smollm2-135m smollm2-360m llama-3.2-1b llama-3.2-3b mistral-7b --plot out.png
    python benchmarks/conversion.py mistral-7b phi-4-mini --memory 16

Random weights in the real geometry; int4 in groups of 32, embedding in int4 too, context 2048. Time is that of the
whole command, start-up and quantization included, verification left out. Memory is the peak resident set, mapped
files included. --memory sets RLIMIT_DATA, so that an export that needs more fails. The peers are ExecuTorch's
export_llm, litert-torch's export_hf (which needs TensorFlow) and onnxruntime-genai's model builder.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geometries import GEOMETRIES, make
from peers import CONTEXT, PEERS, Command
from rich.console import Console
from rich.table import Table

FILES = {
    "executorch": "model.pte",
    "litert": "model.litertlm",
    "onnx": "model.onnx",
    "coreml": "Model.mlpackage",
}
_RECIPE = ("--bits", "4", "--group-size", "32", "--embedding-bits", "4")


@dataclass(frozen=True)
class Cost:
    """Of one conversion."""

    seconds: float
    peak_mib: float
    bytes: int


def main() -> None:
    """Convert, and print a row per geometry and tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("geometries", nargs="+", choices=GEOMETRIES)
    parser.add_argument("--format", dest="formats", action="append", choices=FILES, help="[executorch]")
    parser.add_argument("--together", action="store_true", help="all formats in one command too")
    parser.add_argument("--peer", action="store_true", help="beside the peer of each format (Llama only)")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--memory", type=float, help="GiB that our export may take")
    parser.add_argument("--work", type=Path, help="keep models and artifacts here")
    parser.add_argument("--plot", type=Path, help="draw time and memory by size")
    arguments = parser.parse_args()
    if arguments.peer and (lacking := set(arguments.formats or ()) - set(PEERS)):
        parser.error(f"no peer of {', '.join(lacking)} is known here")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        rows = [row for name in arguments.geometries for row in _rows(name, work, arguments)]
    _print(rows)
    if arguments.plot:
        _plot(
            [(source, cost) for _, tool, source, cost in rows if tool == "slm-export executorch"],
            arguments.plot,
        )


def _rows(name: str, work: Path, arguments: argparse.Namespace) -> list[tuple[str, str, int, Cost]]:
    work = work.resolve()
    folder = make(name, work / name)
    source = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    formats = arguments.formats or ["executorch"]
    rows = []
    for format in formats:
        out = work / f"{name}-{format}"
        rows.append((name, f"slm-export {format}", source, ours(folder, out, [format], arguments.memory)))
        if arguments.peer:
            tool, prepare = PEERS[format]
            with prepare(name, folder, work, arguments.peer_python) as command:
                rows.append((name, tool, source, _measured(command)))
    if arguments.together:
        cost = ours(folder, work / f"{name}-together", formats, arguments.memory)
        rows.append((name, f"slm-export {' '.join(formats)}", source, cost))
    return rows


def ours(folder: Path, out: Path, formats: Sequence[str], memory: float | None = None) -> Cost:
    """Convert with slm-export."""
    target = "ios" if "coreml" in formats else "android"
    command = [sys.executable, "-m", "slm_export", str(folder), "--target", target, *_RECIPE]
    command += [part for format in formats for part in ("--format", format)]
    command += ["--context", str(CONTEXT), "--no-verify", "--no-bench", "--force", "--out", str(out)]
    return _measured(Command(command, [out / format / FILES[format] for format in formats]), memory)


def _measured(command: Command, memory: float | None = None) -> Cost:
    def limit() -> None:
        if memory:
            size = int(memory * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command.arguments, stdout=log, stderr=log, preexec_fn=limit, cwd=command.folder
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if child.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command.arguments)}\n{log.read()[-3000:].decode(errors='replace')}")
    return Cost(seconds, usage.ru_maxrss / 1024, sum(size_of(path) for path in command.made))


def size_of(path: Path) -> int:
    """Return the bytes of an artifact, data beside it included."""
    files = [path, *path.parent.glob(f"{path.name}.*"), *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def _print(rows: Sequence[tuple[str, str, int, Cost]]) -> None:
    table = Table("geometry", "tool", "source MB", "seconds", "peak MiB", "file MB")
    for name, tool, source, cost in rows:
        figures = (
            f"{source / 1e6:.0f}",
            f"{cost.seconds:.1f}",
            f"{cost.peak_mib:.0f}",
            f"{cost.bytes / 1e6:.1f}",
        )
        table.add_row(name, tool, *figures)
    console = Console(width=110)
    console.print(table)
    costs = {(name, tool): cost for name, tool, _, cost in rows}
    for format, (tool, _) in PEERS.items():
        for name in dict.fromkeys(name for name, *_ in rows):
            mine, other = costs.get((name, f"slm-export {format}")), costs.get((name, tool))
            if mine and other:
                console.print(
                    f"{name} {format}: slm-export takes {mine.seconds / other.seconds:.3f} of {tool}'s time, "
                    f"{mine.peak_mib / other.peak_mib:.3f} of its memory, {mine.bytes / other.bytes:.3f} of its size"
                )
    for (name, tool), cost in costs.items():
        alone = [
            costs[name, f"slm-export {format}"].seconds for format in tool.split()[1:] if format in FILES
        ]
        if len(alone) > 1:
            console.print(
                f"{name}: together {cost.seconds / sum(alone):.3f} of the sum of the commands alone"
            )


def _plot(points: Sequence[tuple[int, Cost]], path: Path) -> None:
    import matplotlib.pyplot as plt

    points = sorted(points, key=lambda point: point[0])
    sizes = [source / 1e9 for source, _ in points]
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(10, 4))
    time_axis.plot(sizes, [cost.seconds for _, cost in points], "o-")
    time_axis.set(xlabel="source, GB", ylabel="seconds", ylim=(0, None), xlim=(0, None))
    memory_axis.plot(sizes, [cost.peak_mib / 1024 for _, cost in points], "o-", label="peak resident memory")
    memory_axis.plot(sizes, [cost.bytes / 2**30 for _, cost in points], "s--", label="artifact")
    memory_axis.set(xlabel="source, GB", ylabel="GiB", ylim=(0, None), xlim=(0, None))
    memory_axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
