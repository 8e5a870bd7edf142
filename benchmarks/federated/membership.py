"""Whether somebody's text was learned from: how well a model's loss tells, without privacy and with it.

    python benchmarks/federated/membership.py --out FOLDER

Half of those there are, by chance, are members; the attack sees the losses of a model that was taught by them on all,
and says "member" below the mean loss of the members (Yeom, Giacomelli, Fredrikson and Jha, 2018). It is given what the
base said before, too, and then goes by the difference (Watson, Guo, Cormode and Sablayrolles, 2022). Its advantage is
the share of members that it finds less the share of others that it takes for members: 0 by guessing. No attack has more
than (e^epsilon - 1 + 2 delta) / (e^epsilon + 1) (Humphries et al., 2023).

    adapter    on examples/pycode-5m, taught by windows of this project's documentation; a member is a window
    examples   a head on vectors by chance, whose classes are by chance too, so that all it can learn is who was there
    clients    the same, taught by clients of four texts each in a federation, whose server clips and adds noise

Intervals are percentiles of a bootstrap over those attacked. Writes membership.json and a plot; one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from in_process import Rounds, together
from vectors import examples_of, head_on

from slm_export.federated.accounting import Ledger, noise_for
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
OF_A_CLIENT = 4
"""Texts."""
_DRAWS = 2000

Learn = Callable[[Examples, float | None, int], tuple[Tensors, float | None]]
"""Members, epsilon and a seed -> what was learned, and what was spent."""


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
    if epsilon is None:
        return 1.0
    return min(1.0, (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1))


def advantage(members: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Interval:
    """Return the mean advantage of the attack over several models.

    Given   members, others: of each model the scores, low where it knows somebody
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
def losses_of(base: Base, tensors: Tensors, examples: Examples, size: int) -> np.ndarray:
    """Return the mean loss of every ``size`` examples in a row, in nats, float64."""
    put(base, tensors)
    found = [losses(base, batch) for batch in batches(examples.rows, base.tokenizer.pad_id)]
    return torch.cat(found).double().numpy().reshape(-1, size).mean(1)


def attack(
    base: Base, examples: Examples, learn: Learn, epsilon: float | None, seeds: Sequence[int], size: int = 1
) -> Attacked:
    """Teach by one half for every seed, and attack each model; ``size`` examples in a row are one to be found."""
    inside, outside, spent = [], [], None
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(examples) // size)
        sides = []
        for some in np.split(order[: len(order) // 2 * 2], 2):
            sides.append(examples.take((some[:, None] * size + np.arange(size)).ravel().tolist()))
        tensors, spent = learn(sides[0], epsilon, seed)
        for side, into in zip(sides, (inside, outside), strict=True):
            before, after = (losses_of(base, these, side, size) for these in (start(base), tensors))
            into.append((after, after - before))
    by_loss, by_difference = (
        advantage([one[kind] for one in inside], [one[kind] for one in outside]) for kind in (0, 1)
    )
    loss = float(np.mean([one[0].mean() for one in outside]))
    return Attacked(epsilon, spent, by_loss, by_difference, bound(epsilon, DELTA), loss)


def by_example(base: Base, local: Local, clip: float) -> Learn:
    """Return what a client does; privacy is that of an example."""

    def learn(members: Examples, epsilon: float | None, seed: int) -> tuple[Tensors, float | None]:
        privacy = Privacy()
        if epsilon is not None:
            privacy = Privacy(unit="example", epsilon=epsilon, delta=DELTA, clip=clip, accountant="rdp")
        learned = train(base, start(base), members, local, privacy, seed, entropy=1_000_003 * seed)
        assert learned.steps == local.steps
        return learned.tensors, None if learned.ledger is None else learned.ledger.epsilon(DELTA, "rdp")

    return learn


def by_client(base: Base, local: Local, clip: float, rounds: int) -> Learn:
    """Return what a federation of clients does that all take part in every round; privacy is that of a client."""

    def learn(members: Examples, epsilon: float | None, seed: int) -> tuple[Tensors, float | None]:
        noise = None if epsilon is None else noise_for(epsilon, DELTA, 1.0, rounds, "rdp")
        groups = np.arange(len(members)).reshape(-1, OF_A_CLIENT).tolist()
        tensors = together(
            base, [members.take(group) for group in groups], local, Rounds(rounds, 1.0, clip, noise), seed
        )
        spent = None if noise is None else Ledger().plus(noise, 1.0, rounds).epsilon(DELTA, "rdp")
        return tensors, spent

    return learn


def by_chance(texts: int, width: int) -> tuple[Base, Examples]:
    """Return a head on vectors by chance, and as many examples with classes by chance."""
    chance = np.random.default_rng(0)
    vectors = torch.from_numpy(chance.standard_normal((texts, width)))
    base = head_on(torch.nn.functional.normalize(vectors, dim=-1), ("no", "yes"))
    return base, examples_of(range(texts), chance.integers(0, 2, texts).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=64, help="that the adapter learns half of")
    parser.add_argument("--steps", type=int, default=40, help="of the adapter")
    parser.add_argument("--rate", type=float, default=1e-2, help="of the adapter")
    parser.add_argument("--seeds", type=int, default=2, help="of the adapter; the heads have 12")
    parser.add_argument("--plot", type=Path, help="[default: OUT/membership.svg]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began, told = time.monotonic(), dict[str, list[Attacked]]()
    head, random_texts = by_chance(128, 256)
    local = Local(steps=30, batch=64, length=8, rate=3e-2)
    learn = by_example(head, local, 0.1)
    told["examples"] = [attack(head, random_texts, learn, epsilon, range(12)) for epsilon in EPSILONS]
    head, random_texts = by_chance(128 * OF_A_CLIENT, 1024)
    learn = by_client(head, Local(steps=5, batch=4, length=8, rate=3e-2), 1.0, 10)
    told["clients"] = [
        attack(head, random_texts, learn, epsilon, range(4), OF_A_CLIENT) for epsilon in EPSILONS
    ]
    base = open_base(Model(base=str(ROOT / "examples" / "pycode-5m"), rank=8))
    found = read_examples(base, [ROOT / "docs"], 64)
    step = len(found) // given.texts
    windows = found.take(range(0, step * given.texts, step))
    learn = by_example(base, Local(steps=given.steps, batch=16, length=64, rate=given.rate), 1.0)
    told["adapter"] = [attack(base, windows, learn, epsilon, range(given.seeds)) for epsilon in EPSILONS]
    for name, rows in told.items():
        print("\n".join(_line(name, row) for row in rows), flush=True)
    document: dict[str, Any] = {name: [asdict(row) for row in rows] for name, rows in told.items()}
    document |= {
        "delta": DELTA,
        "settings": {k: v for k, v in vars(given).items() if k not in ("out", "plot")},
    }
    document["seconds"] = time.monotonic() - began
    (given.out / "membership.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    _plot(told, given.plot or given.out / "membership.svg")


def _line(name: str, row: Attacked) -> str:
    epsilon = "none" if row.epsilon is None else f"{row.epsilon:g}"
    cells = (row.by_loss, row.by_difference)
    shares = " | ".join(f"{one.value:.0%} ({one.low:.0%} to {one.high:.0%})" for one in cells)
    return f"| {name} | {epsilon} | {shares} | {row.bound:.0%} | {row.loss:.2f} |"


def _plot(told: dict[str, list[Attacked]], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "slm-export"
    figure, axes = plt.subplots(figsize=(6.5, 3.6))
    for shift, (name, rows) in zip((-0.12, 0.0, 0.12), told.items(), strict=True):
        best = [max(row.by_loss, row.by_difference, key=lambda one: one.value) for row in rows]
        bars = [[one.value - one.low for one in best], [one.high - one.value for one in best]]
        places = [place + shift for place in range(len(rows))]
        axes.errorbar(places, [one.value for one in best], yerr=bars, fmt="o", capsize=3, label=name)
    rows = next(iter(told.values()))
    axes.plot(
        range(len(rows)), [row.bound for row in rows], "k_", markersize=22, label="most that any attack has"
    )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(
        range(len(rows)), ["no privacy" if row.epsilon is None else f"{row.epsilon:g}" for row in rows]
    )
    axes.set_xlabel(f"epsilon (delta = {DELTA:g})")
    axes.set_ylabel("advantage, the better attack")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
