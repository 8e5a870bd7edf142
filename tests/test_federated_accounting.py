"""What was spent of a privacy budget, against a closed form and against Google's accountant."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from slm_export.errors import InputError
from slm_export.federated.accounting import Accountant, Budget, Event, Ledger, noise_for
from slm_export.federated.noise import gaussian

pytest.importorskip("opacus", reason="pip install 'slm-export[federated]'")

BOTH: tuple[Accountant, ...] = ("prv", "rdp")

# dp-accounting 0.6.0 (Google), neighbours by add-or-remove-one, PoissonSampledDpEvent of GaussianDpEvent:
# events, delta, epsilon of its RdpAccountant, epsilon of its PLDAccountant (privacy loss distributions, both ways)
GOOGLE: list[tuple[tuple[Event, ...], float, float, float]] = [
    (((1.0, 0.01, 1000),), 1e-5, 2.101366525420273, 1.8282436455855091),
    (((1.1, 0.2, 50),), 1e-5, 9.58464441638772, 8.604573919621057),
    (((2.0, 1.0, 10),), 1e-5, 8.079406222420491, 7.511275931204883),
    (((0.8, 0.05, 40), (1.5, 0.2, 20)), 1e-6, 6.7910345894046005, 5.950800698787041),
    (((3.0, 0.5, 30),), 1e-3, 3.386874553317047, 2.96502357795088),
]


def balle_wang(noise: float, times: int, delta: float) -> float:
    """Return epsilon of plain Gaussians (Balle and Wang, 2018, theorem 8): several are one of less noise."""
    sigma = noise / math.sqrt(times)

    def excess(epsilon: float) -> float:
        first = norm.cdf(1 / (2 * sigma) - epsilon * sigma)
        return float(first - math.exp(epsilon) * norm.cdf(-1 / (2 * sigma) - epsilon * sigma) - delta)

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize(("noise", "times"), [(2.0, 10), (1.0, 1), (5.0, 1), (4.0, 30)])
def test_where_all_take_part_it_is_the_closed_form(noise: float, times: int) -> None:
    exact = balle_wang(noise, times, 1e-5)
    ledger = Ledger().plus(noise, 1.0, times)
    assert exact <= ledger.epsilon(1e-5, "prv") <= exact + 0.02
    assert exact <= ledger.epsilon(1e-5, "rdp") <= 1.2 * exact + 0.1


@pytest.mark.parametrize(("events", "delta", "by_rdp", "by_distributions"), GOOGLE)
def test_an_accountant_of_other_people_says_the_same(
    events: tuple[Event, ...], delta: float, by_rdp: float, by_distributions: float
) -> None:
    ledger = Ledger(events)
    # Its orders of Renyi's divergence are others in places; the numerical one errs by 0.01, upwards.
    assert ledger.epsilon(delta, "rdp") == pytest.approx(by_rdp, rel=2e-3)
    assert by_distributions <= ledger.epsilon(delta, "prv") <= by_distributions + 0.02


@pytest.mark.parametrize("accountant", BOTH)
def test_noise_found_for_a_budget_keeps_it_and_is_hardly_more_than_needed(accountant: Accountant) -> None:
    noise = noise_for(2.0, 1e-4, 0.2, 20, accountant)
    budget = Budget(2.0, 1e-4, accountant)
    assert budget.allows(Ledger().plus(noise, 0.2, 20))
    assert not budget.allows(Ledger().plus(0.98 * noise, 0.2, 20))


@pytest.mark.parametrize("accountant", BOTH)
def test_a_budget_ends_before_it_is_exceeded(accountant: Accountant) -> None:
    budget, ledger = Budget(2.0, 1e-4, accountant), Ledger()
    most = budget.most(ledger, 1.0, 0.1, 20)
    assert 1 < most < 20
    while budget.allows(after := ledger.plus(1.0, 0.1)):
        ledger = after
    assert ledger.releases == most
    assert ledger.epsilon(1e-4, accountant) <= 2.0 < ledger.plus(1.0, 0.1).epsilon(1e-4, accountant)
    assert budget.most(ledger, 1.0, 0.1, 20) == 0
    # One that is half as private costs more than a whole one: what was spent before is counted, whatever its noise was.
    assert not budget.allows(ledger.plus(0.5, 0.1))
    assert budget.recorded(ledger)["spent"]["epsilon"] <= budget.recorded(ledger)["declared"]["epsilon"]


def test_nothing_costs_nothing_and_more_costs_more() -> None:
    assert Ledger().epsilon(1e-5) == 0
    assert Budget(1e-9, 1e-9).allows(Ledger())
    spent = [Ledger().plus(1.5, 0.3, times).epsilon(1e-5, "rdp") for times in (1, 2, 4, 8)]
    assert spent == sorted(spent)
    assert Ledger().plus(1.5, 0.3, 0) == Ledger()


def test_a_ledger_is_written_and_read() -> None:
    ledger = Ledger().plus(1.5, 0.3).plus(1.5, 0.3, 2).plus(2.0, 0.3)
    assert ledger.events == ((1.5, 0.3, 3), (2.0, 0.3, 1))
    assert Ledger.of(json.loads(json.dumps(ledger.recorded()))) == ledger
    assert ledger.releases == 4


GOOD = {"noise": 1.0, "rate": 0.5, "times": 1}


@pytest.mark.parametrize(
    "recorded",
    [
        "",
        {},
        None,
        [1],
        [{"noise": 1.0}],
        [GOOD | {"noise": "1"}],
        [GOOD | {"noise": 0}],
        [GOOD | {"noise": math.nan}],
        [GOOD | {"rate": 1.5}],
        [GOOD, GOOD | {"times": -1}],
    ],
)
def test_a_ledger_that_is_none_is_refused(recorded: object) -> None:
    with pytest.raises(InputError):
        Ledger.of(recorded)


def test_a_budget_that_no_noise_keeps_is_refused() -> None:
    # Renyi's divergences at Opacus's orders cannot tell less than about 0.1 at this delta.
    with pytest.raises(InputError, match="cannot be kept over 100 releases"):
        noise_for(0.01, 1e-5, 0.1, 100, "rdp")
    assert noise_for(0.05, 1e-5, 0.1, 100, "prv") > 10


@pytest.mark.parametrize("entropy", [None, 7])
def test_noise_is_normal(entropy: int | None) -> None:
    drawn = gaussian((100, 1000), entropy).ravel()
    # Seven standard errors of each moment, of 100,000 independent numbers: by chance in no run of this universe.
    assert abs(drawn.mean()) < 7 / math.sqrt(len(drawn))
    assert abs(drawn.var() - 1) < 7 * math.sqrt(2 / len(drawn))
    assert abs((drawn**4).mean() - 3) < 7 * math.sqrt(96 / len(drawn))
    assert np.abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 7 / math.sqrt(len(drawn))


def test_noise_comes_again_of_the_same_entropy_alone() -> None:
    assert (gaussian((5,), 1) == gaussian((5,), 1)).all()
    assert (gaussian((5,), 1) != gaussian((5,), 2)).all()
    assert (gaussian((5,)) != gaussian((5,))).all()
    assert gaussian(()).shape == ()
    assert gaussian((0, 3)).shape == (0, 3)
