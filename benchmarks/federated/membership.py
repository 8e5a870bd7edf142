"""Whether a text was among those that were learned from: how well a model's loss tells, without privacy and with it.

    python benchmarks/federated/membership.py --out FOLDER

An adapter on examples/pycode-5m learns half of a set of texts, by chance; the attack sees its losses on all of them
and says "member" below the mean loss of the members (Yeom, Giacomelli, Fredrikson and Jha, 2018). It is given what the
base said of each text before, too, and then goes by the difference (Watson, Guo, Cormode and Sablayrolles, 2022). Its
advantage is the share of members that it finds less the share of others that it takes for members: 0 by guessing.
Privacy is that of an example, by Opacus on the client; no attack whatever has more than (e^epsilon - 1 + 2 delta) /
(e^epsilon + 1) (Humphries et al., 2023). Intervals are percentiles of a bootstrap over the texts. Writes
membership.json and a plot; one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm_export.federated.accounting import Ledger
from slm_export.federated.base import Base, open_base, put, start
from slm_export.federated.examples import Examples, read_examples
from slm_export.federated.local import losses, train
from slm_export.federated.settings import Local, Model, Privacy
from slm_export.federated.updates import Tensors
from slm_export.learning.evaluation import batches
from slm_export.learning.measures import Interval

ROOT = Path(__file__).resolve().parents[2]
EPSILONS = (None, 64.0, 16.0, 4.0, 1.0)
DELTA = 1e-3
_DRAWS = 2000


@dataclass(frozen=True)
class Attacked:
    """What the attack made of one budget."""

    epsilon: float | None
    """Declared; None: no privacy."""
    spent: float | None
    by_loss: Interval
    by_difference: Interval
    bound: float
    """That no attack exceeds."""
    loss: float
    """Mean loss of the others, in nats: what the privacy costs."""


def bound(epsilon: float | None, delta: float) -> float:
    """Return the most advantage that any attack can have."""
    return 1.0 if epsilon is None else min(1.0, (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1))


def advantage(members: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Interval:
    """Return the mean advantage of the attack over several models.

    Given   members, others: of each model the scores of texts, low where it knows them
    """
    chance = np.random.default_rng(0)

    def drawn(scores: np.ndarray) -> np.ndarray:
        return scores[chance.integers(0, len(scores), (_DRAWS, len(scores)))]

    def gap(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
        threshold = inside.mean(-1, keepdims=True)
        found: np.ndarray = (inside <= threshold).mean(-1) - (outside <= threshold).mean(-1)
        return found

    pairs = list(zip(members, others, strict=True))
    draws = np.mean([gap(drawn(inside), drawn(outside)) for inside, outside in pairs], axis=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(np.mean([gap(*pair) for pair in pairs])), float(low), float(high))


@torch.no_grad()
def losses_of(base: Base, tensors: Tensors, examples: Examples) -> np.ndarray:
    """Return the loss of every example in nats, float64."""
    put(base, tensors)
    found = [losses(base, batch) for batch in batches(examples.rows, base.tokenizer.pad_id)]
    return torch.cat(found).double().numpy()


def attack(
    base: Base, examples: Examples, local: Local, clip: float, epsilon: float | None, seeds: Sequence[int]
) -> Attacked:
    """Train on one half of the examples for every seed, and attack each model."""
    before = losses_of(base, start(base), examples)
    inside, outside, spent = [], [], None
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(examples))
        half = len(order) // 2
        privacy = Privacy()
        if epsilon is not None:
            privacy = Privacy(unit="example", epsilon=epsilon, delta=DELTA, clip=clip, accountant="rdp")
        learned = train(
            base, start(base), examples.take(order[:half]), local, privacy, seed, entropy=1_000_003 * seed
        )
        if epsilon is not None:
            assert isinstance(learned.ledger, Ledger)
            assert learned.steps == local.steps
            spent = learned.ledger.epsilon(DELTA, "rdp")
        after = losses_of(base, learned.tensors, examples)
        for side, chosen in ((inside, order[:half]), (outside, order[half : 2 * half])):
            side.append((after[chosen], after[chosen] - before[chosen]))
    by_loss, by_difference = (
        advantage([one[kind] for one in inside], [one[kind] for one in outside]) for kind in (0, 1)
    )
    loss = float(np.mean([one[0].mean() for one in outside]))
    return Attacked(epsilon, spent, by_loss, by_difference, bound(epsilon, DELTA), loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=ROOT / "docs", help="what is learned and attacked")
    parser.add_argument("--texts", type=int, default=96, help="half of them are members")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="[default: OUT/membership.svg]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    base = open_base(Model(base=str(ROOT / "examples" / "pycode-5m"), rank=8))
    found = read_examples(base, [given.text], 64)
    step = len(found) // given.texts
    examples = found.take(range(0, step * given.texts, step))
    local = Local(steps=given.steps, batch=16, length=64, rate=given.rate)
    rows = []
    for epsilon in EPSILONS:
        rows.append(attack(base, examples, local, 1.0, epsilon, range(given.seeds)))
        print(_line(rows[-1]), flush=True)
    told: dict[str, Any] = {
        "rows": [asdict(row) for row in rows],
        "delta": DELTA,
        "texts": len(examples),
        "settings": local.model_dump(),
        "seeds": given.seeds,
        "seconds": time.monotonic() - began,
    }
    (given.out / "membership.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _plot(rows, given.plot or given.out / "membership.svg")


def _line(row: Attacked) -> str:
    name = "none" if row.epsilon is None else f"{row.epsilon:g}"
    cells = (row.by_loss, row.by_difference)
    shares = " | ".join(f"{one.value:.0%} ({one.low:.0%} to {one.high:.0%})" for one in cells)
    return f"| {name} | {shares} | {row.bound:.0%} | {math.exp(row.loss):.1f} |"


def _plot(rows: Sequence[Attacked], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "slm-export"
    figure, axes = plt.subplots(figsize=(6, 3.6))
    names = ["none" if row.epsilon is None else f"{row.epsilon:g}" for row in rows]
    for shift, label, key in (
        (-0.08, "by loss", "by_loss"),
        (0.08, "by difference to the base", "by_difference"),
    ):
        found: list[Interval] = [getattr(row, key) for row in rows]
        values = [one.value for one in found]
        bars = [
            [value - one.low for value, one in zip(values, found, strict=True)],
            [one.high - value for value, one in zip(values, found, strict=True)],
        ]
        places = [place + shift for place in range(len(rows))]
        axes.errorbar(places, values, yerr=bars, fmt="o", capsize=3, label=label)
    axes.plot(
        range(len(rows)), [row.bound for row in rows], "k_", markersize=18, label="no attack can do better"
    )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(rows)), names)
    axes.set_xlabel(f"epsilon of an example (delta = {DELTA:g})")
    axes.set_ylabel("advantage of the attack")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
