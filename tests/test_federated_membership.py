"""What an attack by loss tells of who was among the examples: much without privacy, less the smaller epsilon is."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks" / "federated"))

from membership import DELTA, advantage, attack, bound
from vectors import examples_of, head_on

from slm_export.federated.settings import Local

pytest.importorskip("opacus", reason="pip install 'slm-export[federated]'")

TEXTS, WIDTH = 128, 256
LOCAL = Local(steps=30, batch=64, length=8, rate=3e-2)


def test_the_advantage_drops_as_epsilon_does() -> None:
    # Classes by chance: whatever a model knows of them it remembers of the examples.
    chance = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.from_numpy(chance.standard_normal((TEXTS, WIDTH))), dim=-1)
    base = head_on(vectors, ("no", "yes"))
    examples = examples_of(range(TEXTS), chance.integers(0, 2, TEXTS).tolist())
    found = [attack(base, examples, LOCAL, 0.1, epsilon, range(12)) for epsilon in (None, 64.0, 0.5)]
    none, little, much = (one.by_loss for one in found)
    assert none.low > 0.4
    assert little.high < none.low
    assert much.high < little.low
    assert much.low < 0.1, "hardly better than guessing"
    for one in found:
        assert one.by_loss.low <= one.bound
        assert one.epsilon is None or (one.spent is not None and one.spent <= one.epsilon)


def test_an_attack_that_knows_all_finds_all_and_one_that_guesses_finds_nothing() -> None:
    apart = advantage([np.zeros(50)], [np.ones(50)])
    assert (apart.value, apart.low, apart.high) == (1, 1, 1)
    scores = np.random.default_rng(0).standard_normal((2, 5000))
    alike = advantage([scores[0]], [scores[1]])
    assert alike.low < 0 < alike.high
    assert abs(alike.value) < 0.05


def test_the_bound_of_all_attacks() -> None:
    assert bound(None, DELTA) == 1
    assert bound(0.0, 0.0) == 0
    assert bound(1.0, 0.0) == pytest.approx((np.e - 1) / (np.e + 1))
