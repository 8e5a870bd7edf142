"""What clients that write of unlike things teach a language model together, beside what each teaches it alone.

    python benchmarks/federated/perplexity.py --out FOLDER

Twenty clients hold windows of 64 tokens, dealt out by a Dirichlet distribution over four kinds of text that installed
packages bring: C++ headers, descriptions in English, type stubs, and CMake. An adapter of low rank on
examples/pycode-5m, which was trained on Python, learns from them

    nothing       the model as it is
    alone         clients by themselves (the first --alone of them), as many steps as rounds have
    together      federated averaging: in each round every client takes part with probability --fraction, by itself
    epsilon = 8   the same, with user-level privacy: of twenty clients none can be hidden without hiding all
    in one place  all windows of all clients

The code is that of server and clients, called in one process, without Flower between. Figures are perplexities on
documents that share no run of 13 words with what is learned from; intervals are a bootstrap over those documents, of
one partition and one seed. Writes perplexity.json; one thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from in_process import Rounds, together

from slm_export.federated.accounting import noise_for
from slm_export.federated.base import Base, open_base, put, start
from slm_export.federated.examples import Examples
from slm_export.federated.local import train
from slm_export.federated.partition import Parts, dirichlet
from slm_export.federated.settings import Local, Model, Privacy
from slm_export.federated.updates import Tensors
from slm_export.learning.evaluation import log_perplexities
from slm_export.learning.held_out import split
from slm_export.learning.measures import Interval, mean
from slm_export.learning.texts import Document, Texts
from slm_export.learning.windows import windows

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("headers", "descriptions", "stubs", "cmake")
EPSILON = 8.0
LONGEST = 6000
"""Characters of a document."""
NONE = Privacy()


@dataclass(frozen=True)
class HeldOut:
    """What is measured on: as many windows of each kind."""

    examples: Examples
    documents: tuple[int, ...]


def documents_of(kind: str, most: int) -> list[Document]:
    """Return texts of a kind, in an order by chance."""
    if kind == "descriptions":
        found = {
            d.metadata["Name"]: str(d.metadata.get_payload()) for d in importlib.metadata.distributions()
        }
        texts = [(name, text) for name, text in sorted(found.items()) if len(text) > 1000]
    else:
        package, below, suffix = {
            "headers": ("torch", "include/ATen", ".h"),
            "stubs": ("numpy", ".", ".pyi"),
            "cmake": ("torch", "share/cmake", ".cmake"),
        }[kind]
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0])
        files = sorted(file for file in (folder / below).rglob(f"*{suffix}") if file.stat().st_size > 1000)
        texts = [(str(file.relative_to(folder)), file.read_text(encoding="utf-8")) for file in files]
    chosen = np.random.default_rng(0).permutation(len(texts))[:most]
    return [Document(texts[i][0], texts[i][1][:LONGEST]) for i in chosen]


def matter(base: Base, given: argparse.Namespace) -> tuple[Examples, HeldOut]:
    """Return as many windows of each kind to learn from, and to measure on."""
    learned: list[Any] = []
    measured: list[Any] = []
    for number, kind in enumerate(KINDS):
        documents = documents_of(kind, 160)
        parts = split(Texts(tuple(documents), len(documents)), None, share=0.25)
        sides = (
            (parts.training, learned, given.clients * given.windows),
            (parts.held_out, measured, given.held_out),
        )
        for texts, side, most in sides:
            found = windows(texts, base.tokenizer, given.length)
            wanted = most // len(KINDS)
            assert len(found) >= wanted, f"{kind}: {len(found)} windows, of {wanted}"
            order = np.random.default_rng(1).permutation(len(found))[:wanted]
            side += [(found[i], number, 1000 * number + found[i]["document"][0]) for i in order]
    rows = tuple(row for row, _, _ in learned), tuple(row for row, _, _ in measured)
    topics = tuple(topic for _, topic, _ in learned), tuple(topic for _, topic, _ in measured)
    held_out = HeldOut(Examples(rows[1], topics[1]), tuple(document for _, _, document in measured))
    return Examples(rows[0], topics[0]), held_out


def perplexity(base: Base, models: Sequence[Tensors], held_out: HeldOut, weights: np.ndarray) -> Interval:
    """Return the perplexity of models, their log-likelihoods averaged.

    Given   weights: how much the windows of each kind count for each model, (models, kinds)
    """
    sums, counts = np.zeros(len(held_out.examples)), np.zeros(len(held_out.examples))
    for tensors, row in zip(models, weights, strict=True):
        put(base, tensors)
        nats, tokens = log_perplexities(base.module, held_out.examples.rows, base.tokenizer.pad_id)
        by_window = row[list(held_out.examples.topics)]
        sums += by_window * nats.numpy()
        counts += by_window * tokens.numpy()
    return mean(sums.tolist(), counts.tolist(), held_out.documents).through(math.exp)


def ways(
    base: Base, examples: Examples, parts: Parts, local: Local, given: argparse.Namespace
) -> dict[str, list[Tensors]]:
    """Return of every way what was learned: one model of all, or one of each client."""
    clients = [examples.take(part) for part in parts]
    rounds = Rounds(given.rounds, given.fraction)
    delta = 1 / given.clients**1.1
    noisy = Rounds(given.rounds, given.fraction, 1.0, noise_for(EPSILON, delta, given.fraction, given.rounds))
    longer = local.model_copy(update={"steps": local.steps * given.rounds})
    whole = longer.model_copy(update={"batch": 4 * local.batch})
    made: dict[str, list[Tensors]] = {"nothing": [start(base)]}
    for name, work in {
        "together": lambda: [together(base, clients, local, rounds, 0)],
        f"epsilon = {EPSILON:g}": lambda: [together(base, clients, local, noisy, 0)],
        "in one place": lambda: [train(base, start(base), examples, whole, NONE, 0).tensors],
        "alone": lambda: [
            train(base, start(base), one, longer, NONE, 0).tensors for one in clients[: given.alone]
        ],
    }.items():
        began = time.monotonic()
        made[name] = work()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--windows", type=int, default=24, help="of a client")
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--alone", type=int, default=8, help="clients that are also taught by themselves")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    base = open_base(Model(base=str(ROOT / "examples" / "pycode-5m"), rank=4))
    examples, held_out = matter(base, given)
    local = Local(steps=given.steps, batch=4, length=given.length, rate=given.rate)
    parts = dirichlet(examples.topics, given.clients, given.alpha, 0)
    topics = np.asarray(examples.topics)
    own = np.array([np.bincount(topics[list(part)], minlength=len(KINDS)) / len(part) for part in parts])
    rows = {}
    for name, models in ways(base, examples, parts, local, given).items():
        weights = own[: len(models)] if name == "alone" else own.mean(0, keepdims=True)
        found = [perplexity(base, models, held_out, every) for every in (np.ones_like(weights), weights)]
        rows[name] = {"everywhere": asdict(found[0]), "own": asdict(found[1])}
        print(f"| {name} | {found[0]} | {found[1]} |", flush=True)
    told = {"rows": rows, "settings": {k: v for k, v in vars(given).items() if k != "out"}}
    told["values"] = sum(value.size for value in start(base).values())
    told["seconds"] = time.monotonic() - began
    (given.out / "perplexity.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
