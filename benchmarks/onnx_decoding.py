"""How fast ONNX decoders prefill and decode in onnxruntime-genai, side by side, and what memory they take.

    slm-export MODEL --target linux --format onnx --bits 4 --group-size 32 --embedding-bits 4 --out OURS
    python -m onnxruntime_genai.models.builder -i MODEL -o PEER -p int4 -e cpu -c CACHE \\
        --extra_options int4_accuracy_level=4 int4_block_size=32 hf_token=false
    python benchmarks/onnx_decoding.py OURS/onnx PEER

Every folder is open in a process of its own, in the very same runtime and loop; rounds alternate between them, so that
what disturbs the machine disturbs all. Medians over the rounds, with the range; ratios to the last folder named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from slm_export.memory import peak_resident_mb, resident_mb

PROMPT, DECODED, ROUNDS = 128, 32, 7


class _Child:
    def __init__(self, folder: Path) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(folder)], stdin=pipe, stdout=pipe, text=True
        )
        self.load_s = self.answer()["load_s"]

    def round(self) -> dict[str, float]:
        assert self._process.stdin
        print("round", file=self._process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def answer(self) -> dict[str, float]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"the process that measures died: {self._process.args!r}")


def serve(folder: Path) -> None:
    """Measure a round for every line of stdin."""
    import onnxruntime_genai as genai

    before, began = resident_mb(), time.perf_counter()
    model = genai.Model(str(folder))
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        parameters = genai.GeneratorParams(model)
        length = PROMPT + DECODED
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = genai.Generator(model, parameters)
        began = time.perf_counter()
        generator.append_tokens([5] * PROMPT)
        generator.get_logits()
        middle = time.perf_counter()
        for _ in range(DECODED):
            generator.generate_next_token()
        ended = time.perf_counter()
        # The first token that is generated comes from the prompt's own logits.
        speed = {"prefill": PROMPT / (middle - began), "decode": (DECODED - 1) / (ended - middle)}
        print(json.dumps({**speed, "peak_mib": peak_resident_mb() - before}), flush=True)


def main() -> None:
    """Print a row per folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve(arguments.child)
        return
    children = [_Child(folder) for folder in arguments.folders]
    # The first round warms up and is not counted.
    rounds = [[child.round() for child in children] for _ in range(ROUNDS + 1)][1:]
    for child in children:
        child.close()
    speeds = [
        {key: [answers[i][key] for answers in rounds] for key in rounds[0][i]} for i in range(len(children))
    ]
    table = Table(
        "folder", "MB", f"prefill {PROMPT} tok/s", "decode tok/s", "load s", "peak MiB of the model"
    )
    for folder, child, speed in zip(arguments.folders, children, speeds, strict=True):
        shown = [f"{median(x):.1f} ({min(x):.1f}..{max(x):.1f})" for x in (speed["prefill"], speed["decode"])]
        size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        table.add_row(
            str(folder), f"{size / 1e6:.1f}", *shown, f"{child.load_s:.2f}", f"{speed['peak_mib'][-1]:.0f}"
        )
    console = Console(width=130)
    console.print(table)
    for folder, speed in zip(arguments.folders[:-1], speeds, strict=False):
        ratios = [
            f"{key} {median(a / b for a, b in zip(speed[key], speeds[-1][key], strict=True)):.3f}"
            for key in speed
        ]
        console.print(f"{folder} to {arguments.folders[-1]}, median of the rounds: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
