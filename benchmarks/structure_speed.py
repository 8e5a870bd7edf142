"""What taking parts out gains in speed: a pruned artifact beside the unpruned one, in turns, in the runtime itself.

    python benchmarks/structure_speed.py examples/pycode-5m --calibration FILE --format executorch --format onnx
    python benchmarks/structure_speed.py smollm2-135m --uniform --format executorch --format onnx
    python benchmarks/structure_speed.py smollm2-135m --layers 6

A name of geometries.py has random weights: speed follows from shapes alone. Without --calibration the text is random
too. --fraction is of the neurons; 5/18 of them are a fifth of the layers of a Llama whose MLP is three quarters of a
layer. --layers takes whole layers instead, the last ones: which they are makes no difference here. Weights, embedding
and head in 8 bits, one thread; time is that of the processor, which a machine that is shared with other work still
tells. Ratios are of neighbours in turn, their median and quartiles.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median, quantiles

import torch
from geometries import GEOMETRIES, make

from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration, read_calibration
from slm_export.compression.depth import with_layers
from slm_export.compression.workbench import Workbench
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.prune_neurons import PruneNeurons
from slm_export.registry import exporter
from slm_export.runtime import DecoderSession, ExportOptions, Session
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer

CONTEXT, PROMPT, DECODED = 512, 128, 24


def random_text(source: Checkpoint) -> Calibration:
    """Return a little text of random tokens."""
    size = source.config.get_text_config().vocab_size
    ids = torch.randint(size, (8, 64), generator=torch.Generator().manual_seed(1))
    return Calibration(tuple(map(tuple, ids.tolist())), "random tokens")


def body(checkpoint: Checkpoint) -> int:
    """Return the number of parameters of the layers."""
    aside = ("embedding", "head", "table")
    return sum(w.count for name, w in checkpoint.weights.items() if checkpoint.roles[name] not in aside)


def compare(name: str, models: Mapping[str, Checkpoint], tokenizer: SourceTokenizer, runs: int) -> None:
    """Write each model in one format, and let the artifacts take turns."""
    made = exporter(name)
    made.ready()
    with tempfile.TemporaryDirectory() as folder:
        sessions: dict[str, Session] = {}
        for which, checkpoint in models.items():
            path = Path(folder) / which / Path(made.file(checkpoint.task)).name
            path.parent.mkdir()
            options = ExportOptions(
                context=CONTEXT,
                stop_ids=tokenizer.stop_ids,
                bos_id=tokenizer.bos_id,
                adds_bos=tokenizer.adds_bos,
                tokenizer=checkpoint.folder,
            )
            made.write(checkpoint, options, path)
            made.set_threads(1)
            sessions[which] = made.open(path, checkpoint.task)
            size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
            print(f"{name:12}{which:10}{size:12,} bytes", flush=True)
        in_turns(name, sessions, runs)
        for session in sessions.values():
            session.close()


def in_turns(format: str, sessions: Mapping[str, Session], runs: int) -> None:
    """Print tokens per second of processor time, and ratios to the first artifact in the same round."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    prompt = [3 + 37 * i % 4000 for i in range(PROMPT)]
    for number in range(runs + 1):
        # Forwards and backwards, so that none is always the first after another.
        for name in list(sessions)[:: -1 if number % 2 else 1]:
            session = sessions[name]
            assert isinstance(session, DecoderSession)
            began = time.process_time()
            session.logits(prompt, 0)
            read = time.process_time()
            for at in range(DECODED):
                session.logits([prompt[at]], PROMPT + at)
            done = time.process_time()
            if number:  # the first round warms up
                speeds[name].append((PROMPT / (read - began), DECODED / (done - read)))
    first = next(iter(speeds.values()))
    for what, index in (("prefill", 0), ("decode", 1)):
        for name, found in speeds.items():
            ratios = [after[index] / before[index] for before, after in zip(first, found, strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            rate = median(speed[index] for speed in found)
            print(
                f"{format:12}{what:9}{name:10}{rate:8.1f} tokens/s  ratio {middle:.3f} ({low:.3f}..{high:.3f})",
                flush=True,
            )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"a folder, or one of {', '.join(GEOMETRIES)}")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--fraction", type=float, default=5 / 18)
    parser.add_argument("--layers", type=int, default=0, help="take so many layers, and no neurons")
    parser.add_argument("--uniform", action="store_true", help="equally many neurons from every layer")
    parser.add_argument("--format", dest="formats", action="append", help="[executorch]")
    parser.add_argument("--runs", type=int, default=24)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        known = asked.model in GEOMETRIES
        folder = make(asked.model, Path(temporary)) if known else Path(asked.model)
        source, tokenizer = load_checkpoint(folder), SourceTokenizer.load(folder)
        text = random_text(source)
        if asked.calibration:
            text = read_calibration(asked.calibration, tokenizer, source.task, source.positions)
        if asked.layers:
            pruned = with_layers(source, range(source.config.num_hidden_layers - asked.layers), "benchmark")
        else:
            step = PruneNeurons(fraction=asked.fraction, multiple=32, uniform=asked.uniform)
            pruned = step.run(source, Workbench(calibration=text)).checkpoint
        print(f"{asked.model}: body -{1 - body(pruned) / body(source):.1%}", flush=True)
        eight = GroupQuantize(bits=8, embedding_bits=8)
        models = {"unpruned": eight.run(source).checkpoint, "pruned": eight.run(pruned).checkpoint}
        for format in asked.formats or ["executorch"]:
            compare(format, models, tokenizer, asked.runs)


if __name__ == "__main__":
    main()
