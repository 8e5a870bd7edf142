"""What an attack by loss tells of who was learned from: much without privacy, less the smaller epsilon is."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks" / "federated"))

from membership import (
    DELTA,
    OF_A_CLIENT,
    Attacked,
    advantage,
    attack,
    bound,
    by_chance,
    by_client,
    by_example,
)

from slm_export.federated.settings import Local

pytest.importorskip("opacus", reason="pip install 'slm-export[federated]'")


def drops(found: list[Attacked]) -> None:
    none, little, much = (one.by_loss for one in found)
    assert none.low > 0.4
    assert little.high < none.low
    assert much.high < little.low
    assert much.low < 0.1, "hardly better than guessing"
    for one in found:
        assert one.by_loss.low <= one.bound
        assert one.epsilon is None or (one.spent is not None and one.spent <= one.epsilon)


def test_the_advantage_drops_as_epsilon_of_an_example_does() -> None:
    base, examples = by_chance(128, 256)
    learn = by_example(base, Local(steps=30, batch=64, length=8, rate=3e-2), clip=0.1)
    drops([attack(base, examples, learn, epsilon, range(12)) for epsilon in (None, 64.0, 0.5)])


def test_the_advantage_drops_as_epsilon_of_a_client_does() -> None:
    base, examples = by_chance(64 * OF_A_CLIENT, 512)
    learn = by_client(base, Local(steps=5, batch=4, length=8, rate=3e-2), clip=1.0, rounds=3)
    drops([attack(base, examples, learn, epsilon, range(8), OF_A_CLIENT) for epsilon in (None, 8.0, 0.5)])


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
