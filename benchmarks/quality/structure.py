"""What taking parts out costs, and what it gains: the passes beside other choices of the same size.

    python benchmarks/quality/structure.py examples/pycode-5m [--row NAME]... [--tokens 16384]
    python benchmarks/quality/structure.py examples/pycode-5m --recover 150 [--row NAME]...

Perplexity is of the held-out files (heldout.py), against the float32 model, a mean over windows with its standard
error; calibrated on modules of the standard library. The share is of the layers' parameters ("body"): embedding and
head are not touched. --recover adds to each row what so many steps of self-distillation make of it (the pass recover,
low-rank changes merged). What it gains in speed: benchmarks/structure_speed.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from calibrated import Decoder, described, mean
from heldout import calibration_documents
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration, read_calibration
from slm_export.compression.depth import with_layers
from slm_export.compression.distance import spread
from slm_export.compression.geometry import Parts, mlps
from slm_export.compression.narrowing import Narrowing, Wanted
from slm_export.compression.workbench import Workbench
from slm_export.optimizers.drop_layers import DropLayers
from slm_export.optimizers.prune_kv_groups import PruneKvGroups
from slm_export.optimizers.prune_neurons import PruneNeurons
from slm_export.optimizers.recover import Recover
from slm_export.optimizers.sparsify import Sparsify
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer

NEURONS = 5 / 18
"""Of the neurons: in a Llama whose MLP is three quarters of a layer, a fifth of the body."""
RECOVERY = {"tokens": 1024, "rank": 16}
Make = Callable[[Checkpoint, Calibration], Checkpoint]


def passes(*steps: DropLayers | PruneNeurons | PruneKvGroups | Sparsify) -> Make:
    """Return what runs passes one after the other."""

    def make(source: Checkpoint, text: Calibration) -> Checkpoint:
        for step in steps:
            source = step.run(source, Workbench(calibration=text)).checkpoint
        return source

    return make


class Ranked(Narrowing):
    """Neurons in an order of another's making."""

    def __init__(self, rank: Callable[[Checkpoint, Parts], Tensor], *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self._rank = rank

    def order(self, parts: Parts) -> Tensor:
        """Return the neurons, lowest first."""
        return self._rank(self._checkpoint, parts).argsort(stable=True)


def by_chance(checkpoint: Checkpoint, parts: Parts) -> Tensor:
    """Return random ranks."""
    seed = sum(parts.path.encode())
    return torch.rand(parts.count, generator=torch.Generator().manual_seed(seed))


def by_magnitude(checkpoint: Checkpoint, parts: Parts) -> Tensor:
    """Return the product of the norms of what makes a neuron and of what takes it back."""
    rank = checkpoint.weights[f"{parts.out}.weight"].float32()[:, parts.columns[:, 0]].norm(dim=0)
    for name, rows in parts.rows.items():
        rank = rank * checkpoint.weights[f"{name}.weight"].float32()[rows].norm(dim=(1, 2))
    return rank


def ranked(rank: Callable[[Checkpoint, Parts], Tensor], *, refit: bool = False) -> Make:
    """Return what takes equally many neurons from every layer, by another rank."""

    def make(source: Checkpoint, text: Calibration) -> Checkpoint:
        layers = mlps(source, "benchmark")
        wanted = Wanted("benchmark", "neurons", NEURONS, 1, True, 16_384, refit)
        work = Workbench(calibration=text)
        with work.folder() as folder:
            narrowing = Ranked(rank, source, layers, wanted, spread(text.learning, 16_384), folder, work)
            made = [narrowing.without(parts, round(NEURONS * parts.count)) for parts in layers]
        return source.with_weights({name: weight for each in made for name, weight in each.items()})

    return make


def without_layers(*from_the_end: int) -> Make:
    """Return what takes layers by where they stand."""

    def make(source: Checkpoint, text: Calibration) -> Checkpoint:
        count = source.config.num_hidden_layers
        gone = {count - place for place in from_the_end}
        return with_layers(source, [layer for layer in range(count) if layer not in gone], "benchmark")

    return make


ROWS: Mapping[str, Make] = {
    "prune-neurons": passes(PruneNeurons(fraction=NEURONS)),
    "prune-neurons, multiples of 32": passes(PruneNeurons(fraction=NEURONS, multiple=32)),
    "prune-neurons, more": passes(PruneNeurons(fraction=5 / 12, multiple=32)),
    "prune-neurons, uniform": passes(PruneNeurons(fraction=NEURONS, multiple=32, uniform=True)),
    "neurons by chance": ranked(by_chance),
    "neurons by chance, refitted": ranked(by_chance, refit=True),
    "neurons by magnitude": ranked(by_magnitude),
    "neurons by magnitude, refitted": ranked(by_magnitude, refit=True),
    "drop-layers": passes(DropLayers(count=1)),
    "the layer before the last": without_layers(2),
    "the layer in the middle": without_layers(3),
    "prune-kv-groups": passes(PruneKvGroups(fraction=0.25, uniform=False)),
    "prune-kv-groups, uniform": passes(PruneKvGroups(fraction=0.5)),
    "prune-neurons and prune-kv-groups": passes(
        PruneNeurons(fraction=2 / 9), PruneKvGroups(fraction=1 / 6, uniform=False)
    ),
    "drop-layers and prune-neurons": passes(DropLayers(count=1), PruneNeurons(fraction=0.4)),
    "sparsify": passes(Sparsify()),
    "sparsify, 2:4": passes(Sparsify(block=4)),
    "sparsify, 2:4, wanda": passes(Sparsify(block=4, method="wanda")),
    "sparsify, 2:4, magnitude": passes(Sparsify(block=4, method="magnitude")),
    "sparsify, 3:4": passes(Sparsify(0.75, block=4)),
}


def body(checkpoint: Checkpoint) -> int:
    """Return the number of parameters of the layers that are not 0."""
    return sum(
        int(weight.float32().count_nonzero())
        for name, weight in checkpoint.weights.items()
        if checkpoint.roles[name] not in ("embedding", "head", "table")
    )


def quality(source: Checkpoint, rows: Sequence[str], text: Calibration, tokens: int, steps: int) -> None:
    """Print a line per row as it is measured, and one of what ``steps`` of recovery make of it."""
    judge = Decoder(source, SourceTokenizer.load(source.folder), tokens)
    print(f"{source.name}: {judge.what}; ln ratio: increase of the log perplexity")
    for row in rows:
        began = time.monotonic()
        made = ROWS[row](source, text)
        gone = 1 - body(made) / body(source)
        before = judge.measure(made)
        _print(row, gone, described(*before), began)
        if steps:
            began = time.monotonic()
            result = Recover(steps=steps, **RECOVERY).run(made, Workbench(calibration=text))  # type: ignore[arg-type]
            after = judge.measure(result.checkpoint)
            better = f"ln ratio less by {mean(before[1] - after[1])}"  # window by window
            _print("  recovered", gone, f"{described(*after)}  {better}  {result.notes[0]}", began)


def _print(row: str, gone: float, judged: str, began: float) -> None:
    print(f"{row:34} body -{gone:5.1%}  {judged}  {time.monotonic() - began:4.0f} s", flush=True)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--row", action="append", choices=ROWS)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS")
    asked = parser.parse_args()
    source, tokenizer = load_checkpoint(asked.model), SourceTokenizer.load(asked.model)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "calibration.txt"
        file.write_text("\n\f\n".join(calibration_documents()), encoding="utf-8")
        text = read_calibration(file, tokenizer, source.task, source.positions)
    quality(source, asked.row or list(ROWS), text, asked.tokens, asked.recover)


if __name__ == "__main__":
    main()
