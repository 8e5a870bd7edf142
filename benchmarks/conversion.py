"""What converting costs, in seconds and memory, by size of the model and beside ExecuTorch's own exporter.

    python benchmarks/conversion.py llama-3.2-1b --peer
    python benchmarks/conversion.py smollm2-135m smollm2-360m llama-3.2-1b llama-3.2-3b mistral-7b --plot out.png
    python benchmarks/conversion.py mistral-7b phi-4-mini --memory 16

Random weights in the real geometry; int4 in groups of 32, embedding in int4 too, context 2048. Time is that of the
whole command, start-up and quantization included, verification left out. Memory is the peak resident set, mapped
files included. --memory sets RLIMIT_DATA, so that an export that needs more fails.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from geometries import GEOMETRIES, make
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

CONTEXT = 2048
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
    parser.add_argument("--peer", action="store_true", help="beside ExecuTorch's export_llm (Llama only)")
    parser.add_argument("--memory", type=float, help="GiB that our export may take")
    parser.add_argument("--work", type=Path, help="keep models and artifacts here")
    parser.add_argument("--plot", type=Path, help="draw time and memory by size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        rows = [row for name in arguments.geometries for row in _rows(name, work, arguments)]
    _print(rows)
    if arguments.plot:
        _plot([(source, cost) for _, tool, source, cost in rows if tool == "slm-export"], arguments.plot)


def _rows(name: str, work: Path, arguments: argparse.Namespace) -> list[tuple[str, str, int, Cost]]:
    work = work.resolve()
    folder = make(name, work / name)
    source = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rows = [(name, "slm-export", source, ours(folder, work / f"{name}-android", arguments.memory))]
    if arguments.peer:
        rows.append((name, "export_llm", source, peer(name, folder, work / f"{name}-export_llm.pte")))
    return rows


def ours(folder: Path, out: Path, memory: float | None = None) -> Cost:
    """Convert with slm-export."""
    command = [sys.executable, "-m", "slm_export", str(folder), "--target", "android", *_RECIPE]
    command += ["--context", str(CONTEXT), "--no-verify", "--no-bench", "--force", "--out", str(out)]
    return _measured(command, lambda: out / "executorch" / "model.pte", memory)


def peer(name: str, folder: Path, out: Path) -> Cost:
    """Convert with ExecuTorch's export_llm, the same geometry and recipe."""
    checkpoint = out.with_suffix(".pth")
    torch.save(_meta_names(folder), checkpoint)
    parameters = out.with_suffix(".json")
    parameters.write_text(json.dumps(_meta_parameters(name)))
    module = "executorch.extension.llm.export.export_llm"
    options = {
        "base.model_class": "llama3_2",
        "base.checkpoint": checkpoint,
        "base.params": parameters,
        "base.metadata": '\'{"get_bos_id":0, "get_eos_ids":[1]}\'',
        "model.use_kv_cache": True,
        "model.use_sdpa_with_kv_cache": True,
        "model.dtype_override": "fp32",
        "quantization.qmode": "8da4w",
        "quantization.group_size": 32,
        "quantization.embedding_quantize": "'4,32'",
        "backend.xnnpack.enabled": True,
        "backend.xnnpack.extended_ops": True,
        "export.max_seq_length": CONTEXT,
        "export.max_context_length": CONTEXT,
        "export.output_name": out.name,
    }
    try:
        command = [sys.executable, "-m", module, *(f"{key}={value}" for key, value in options.items())]
        # It writes into the current folder, whatever output_dir says.
        return _measured(command, lambda: out, cwd=out.parent)
    finally:
        checkpoint.unlink()


def _measured(
    command: Sequence[str], made: Callable[[], Path], memory: float | None = None, cwd: Path | None = None
) -> Cost:
    def limit() -> None:
        if memory:
            size = int(memory * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=limit, cwd=cwd)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if child.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}\n{log.read()[-3000:].decode(errors='replace')}")
    return Cost(seconds, usage.ru_maxrss / 1024, made().stat().st_size)


def _meta_names(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights under the names of the original Llama release, which export_llm reads."""
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "embed_tokens": "tok_embeddings",
    }
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                name = key.removeprefix("model.")
                for ours, theirs in names.items():
                    name = name.replace(ours, theirs)
                # Rows of wq and wk are in another order there; of random weights any order is as good.
                found[name] = tensors.get_tensor(key)
    found["output.weight"] = found["tok_embeddings.weight"]
    return found


def _meta_parameters(name: str) -> dict[str, Any]:
    cls, options = GEOMETRIES[name]
    if cls != "LlamaForCausalLM":
        raise SystemExit(f"{name}: export_llm is compared for the Llama geometries only")
    return {
        "dim": options["hidden_size"],
        "hidden_dim": options["intermediate_size"],
        "n_layers": options["num_hidden_layers"],
        "n_heads": options["num_attention_heads"],
        "n_kv_heads": options["num_key_value_heads"],
        "vocab_size": options["vocab_size"],
        "norm_eps": options.get("rms_norm_eps", 1e-6),
        "rope_theta": options.get("rope_parameters", {}).get("rope_theta", 10000.0),
        "use_scaled_rope": "rope_parameters" in options,
    }


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
    for (name, tool), cost in costs.items():
        if tool == "export_llm":
            mine = costs[name, "slm-export"]
            console.print(
                f"{name}: slm-export takes {mine.seconds / cost.seconds:.3f} of its time, "
                f"{mine.peak_mib / cost.peak_mib:.3f} of its memory, {mine.bytes / cost.bytes:.3f} of its size"
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
