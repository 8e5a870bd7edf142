"""Budgets met, or not: what was asked for, what was expected before the export, and what the artifact measures.

    python benchmarks/quality/budgets.py examples/pycode-5m --heldout FILE --calibration FILE
    python benchmarks/quality/budgets.py MINILM [--budget "--max-size 18MB"]...

Every row is a whole export by the command line, into ONNX: its search, its gates and its exit code. The texts are those
that heldout.py writes; an encoder is calibrated on the shipped sample and judged on other sentences. The last budget of
each list is met by no choice of bits, and asks for a model with fewer parts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import GENERATION

DECODER = (
    "--max-size 3.7MB",
    "--max-perplexity-ratio 1.005",
    "--max-size 4MB --max-memory 120MB --min-tokens-per-s 50 --max-perplexity-ratio 1.02",
    "--max-size 2.6MB --max-perplexity-ratio 1.25",
)
ENCODER = (
    "--max-size 18MB",
    "--min-cosine 0.99",
    "--max-size 20MB --max-memory 120MB --min-cosine 0.95",
    "--max-size 12MB --min-cosine 0.7",
)
_EXPECTED, _RECIPE = "expected of it: onnx ", "the budget's recipe: "


def row(model: Path, budget: str, texts: list[str], out: Path) -> dict[str, Any]:
    """Return what one export says; ``error`` where it gave up."""
    command = [
        sys.executable,
        "-m",
        "slm_export",
        str(model),
        "--target",
        "host",
        "--format",
        "onnx",
        "--json",
    ]
    began = time.monotonic()
    ended = subprocess.run(
        [*command, *shlex.split(budget), *texts, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(ended.stdout)
    found: dict[str, Any] = {"budget": budget, "exit code": ended.returncode}
    found["seconds"] = round(time.monotonic() - began)
    found["exports"] = ended.stderr.count(_RECIPE)
    if ended.returncode:
        return {**found, "error": report["error"]["message"]}
    notes = [note for note in report["notes"] if note.startswith(_RECIPE)]
    entry = report["formats"][0]
    measured = {"bytes": entry["artifact"]["bytes"], **(entry["quality"] or {}), **(entry["latency"] or {})}
    names = ("bytes", "perplexity_ratio", "kl_mean", "cosine_mean", "model_rss_mb", "decode_tokens_per_s")
    found["expected"] = notes[0].partition(_EXPECTED)[2]
    found["recipe"] = notes[0].removeprefix(_RECIPE).partition("; expected")[0]
    return {**found, "measured": {name: measured[name] for name in names if measured.get(name) is not None}}


def main() -> None:
    """Print a row per budget, as JSON lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", action="append", help="Options of a budget. [default: four]")
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--calibration", type=Path)
    asked = parser.parse_args()
    decodes = load_checkpoint(asked.model).task == GENERATION
    texts = ["--eval-text", str(asked.heldout)] if asked.heldout else []
    texts += ["--calibration", str(asked.calibration)] if asked.calibration else []
    for budget in asked.budget or (DECODER if decodes else ENCODER):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(row(asked.model, budget, texts, Path(folder) / "bundle")), flush=True)


if __name__ == "__main__":
    main()
