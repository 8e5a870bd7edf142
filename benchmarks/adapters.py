"""What keeping an adapter apart costs and saves, beside the same adapter merged before quantization.

    python benchmarks/adapters.py examples/pycode-5m ADAPTER
    python benchmarks/adapters.py examples/pycode-5m --rank 4 --rank 16 --threads 1 --format executorch

ADAPTER is a folder that peft saved for MODEL; without one, factors by chance on every linear layer are taken, of each
rank: speed and size follow from shapes alone. Runs go round in turn, so that a busy machine is busy for all.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slm_export.adapters.build import places_for
from slm_export.adapters.low_rank import read_low_rank
from slm_export.checkpoint import Checkpoint
from slm_export.latency import usable_cores
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.registry import exporter
from slm_export.runtime import AdaptableSession, AdapterExporter, DecoderSession, ExportOptions
from slm_export.source.adapters import merged
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.source.tasks import GENERATION

PROMPT, NEW, CONTEXT = 128, 64, 512


def by_chance(model: Path, folder: Path, rank: int) -> Path:
    """Save an adapter of all linear layers with factors by chance; return its folder."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def write(
    maker: AdapterExporter, checkpoint: Checkpoint, path: Path, bits: int, places: dict[str, Any]
) -> int:
    """Write a quantized model; return its bytes."""
    quantized = GroupQuantize(bits=bits, embedding_bits=8).run(checkpoint).checkpoint
    path.parent.mkdir(parents=True)
    options = ExportOptions(CONTEXT, stop_ids=(1,), bos_id=0, tokenizer=checkpoint.folder, **places)
    return maker.write(quantized, options, path).bytes


def rates(session: DecoderSession) -> tuple[float, float]:
    """Return tokens per second of a prompt, and of decoding behind it."""
    began = time.perf_counter()
    session.logits(list(range(3, 3 + PROMPT)), 0)
    read = time.perf_counter()
    for at in range(NEW):
        session.logits([5 + at], PROMPT + at)
    return PROMPT / (read - began), NEW / (time.perf_counter() - read)


def milliseconds(what: Callable[[], object], runs: int) -> float:
    """Return the median of some runs."""
    spent = []
    for _ in range(runs):
        began = time.perf_counter()
        what()
        spent.append(1000 * (time.perf_counter() - began))
    return statistics.median(spent)


def measure(
    model: Path, folder: Path, arguments: argparse.Namespace, place: Path
) -> tuple[list[tuple[str, ...]], str]:
    """Return a row for each way to ship the adapter, and what switching takes."""
    source, maker, bits = load_checkpoint(model), _maker(arguments.format), arguments.bits
    maker.set_threads(arguments.threads)
    adapter = read_low_rank("adapter", folder, source, source_sha256(model))
    name = Path(maker.file(GENERATION)).name
    plain, apart, whole = (place / each / name for each in ("plain", "apart", "merged"))
    sizes = {
        "base, no places": write(maker, source, plain, bits, {}),
        "adapter merged": write(maker, load_checkpoint(merged(folder, model)), whole, bits, {}),
        "base with places, none on": write(maker, source, apart, bits, places_for([adapter], source)),
    }
    file = place / f"adapter{maker.adapter_suffix}"
    maker.write_adapter(adapter.factors, apart, file)
    sizes["base with places, adapter on"] = sizes["base with places, none on"] + file.stat().st_size
    sessions = [_opened(maker, path) for path in (plain, whole, apart, apart)]
    last = sessions[-1]
    assert isinstance(last, AdaptableSession)
    last.adapt(file)
    found: list[list[tuple[float, float]]] = [[] for _ in sessions]
    for _ in range(arguments.runs + 1):
        for kept, session in zip(found, sessions, strict=True):
            kept.append(rates(session))
    switch = milliseconds(lambda: (last.adapt(None), last.adapt(file)), 21)
    load = milliseconds(lambda: _opened(maker, apart).close(), 5)
    words = (
        f"adapter of rank {adapter.rank}: {file.stat().st_size / 1e6:.2f} MB; off and on again takes {switch:.2f} ms, "
        f"loading the base {load:.1f} ms"
    )
    return [_row(name, sizes[name], kept[1:]) for name, kept in zip(sizes, found, strict=True)], words


def _maker(format: str) -> AdapterExporter:
    maker = exporter(format)
    assert isinstance(maker, AdapterExporter)
    maker.ready()
    return maker


def _opened(maker: AdapterExporter, path: Path) -> DecoderSession:
    session = maker.open(path, GENERATION)
    assert isinstance(session, DecoderSession)
    return session


def _row(name: str, size: int, kept: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    figures = []
    for column in range(2):
        values = sorted(each[column] for each in kept)
        figures.append(f"{statistics.median(values):.0f} ({values[0]:.0f} to {values[-1]:.0f})")
    return name, f"{size / 1e6:.2f}", *figures


def main() -> None:
    """Print a table per adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", nargs="*", type=Path)
    parser.add_argument(
        "--rank", type=int, action="append", help="without ADAPTER; repeatable [default: 4, 16]"
    )
    parser.add_argument("--format", choices=("onnx", "executorch", "litert"), default="onnx")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    console = Console()
    with TemporaryDirectory() as folder:
        asked = arguments.adapters or [
            by_chance(arguments.model, Path(folder) / f"rank-{rank}", rank)
            for rank in arguments.rank or (4, 16)
        ]
        for number, adapter in enumerate(asked):
            rows, words = measure(arguments.model, adapter, arguments, Path(folder) / str(number))
            table = Table("", "MB", f"prompt of {PROMPT}, tokens/s", "decode, tokens/s", box=None)
            for row in rows:
                table.add_row(*row)
            console.print(table)
            console.print(words)


if __name__ == "__main__":
    main()
