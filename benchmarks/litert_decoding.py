"""How fast ``.litertlm`` files prefill and decode in LiteRT-LM, side by side.

    slm-export MODEL --target android --format litert --bits 4 --group-size 32 --embedding-bits 4 --out OURS
    python -m litert_torch.generative.export_hf --model=MODEL --output_dir=PEER --cache_length=2048 \\
        --quantization_recipe=dynamic_wi4b32_afp32 --prefill_lengths=[128]
    python benchmarks/litert_decoding.py OURS/litert/model.litertlm PEER/model.litertlm

Google's own ``litert-lm benchmark`` measures each file in a process of its own; rounds alternate between them, so that
what disturbs the machine disturbs all. Medians over the rounds, with the range; ratios to the last file named.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

PROMPT, DECODED, CONTEXT, THREADS = 128, 64, 2048, 2
FIGURES = {"prefill": "Prefill speed", "decode": "Decode speed", "init": "Init time"}


def measured(path: Path) -> dict[str, float]:
    """Return tokens/s and seconds of one run."""
    command = [str(Path(sys.executable).with_name("litert-lm")), "benchmark", str(path), "--backend", "cpu"]
    command += ["--cpu-thread-count", str(THREADS), "--cache", "memory", "--max-num-tokens", str(CONTEXT)]
    command += ["--prefill-tokens", str(PROMPT), "--decode-tokens", str(DECODED)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = {key: re.search(rf"{label}: +([0-9.]+)", found) for key, label in FIGURES.items()}
    missing = [key for key, value in values.items() if value is None]
    if missing:
        sys.exit(f"{path}: litert-lm did not tell {missing}:\n{found[-2000:]}")
    return {key: float(value[1]) for key, value in values.items() if value is not None}


def main() -> None:
    """Print a row per file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rounds = [[measured(file) for file in arguments.files] for _ in range(arguments.rounds)]
    table = Table("file", "MB", f"prefill {PROMPT} tok/s", f"decode {DECODED} tok/s", "init s")
    for index, file in enumerate(arguments.files):
        cells = []
        for key in FIGURES:
            values = [answers[index][key] for answers in rounds]
            cells.append(f"{median(values):.1f} ({min(values):.1f}..{max(values):.1f})")
        table.add_row(str(file), f"{file.stat().st_size / 1e6:.1f}", *cells)
    console = Console(width=130)
    console.print(table)
    for index, file in enumerate(arguments.files[:-1]):
        ratios = [
            f"{key} {median(answers[index][key] / answers[-1][key] for answers in rounds):.3f}"
            for key in FIGURES
        ]
        console.print(f"{file} to {arguments.files[-1]}, median of the rounds: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
