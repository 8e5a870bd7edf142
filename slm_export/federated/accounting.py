"""What a federation has spent of its privacy budget, and whether it may go on.

Counted are releases of the Poisson-sampled Gaussian mechanism (Mironov, Talwar and Zhang, 2019): of all units, be they
clients or examples, each takes part by itself with probability ``rate``; each contributes a vector of at most a norm of
``clip``; to their sum is added N(0, (noise * clip)^2) in every coordinate. The divisor that makes a mean of it is fixed
beforehand. A sampling of a fixed number is another mechanism, and not counted here.

Two data sets are neighbours where one unit of the one contributes nothing (zero-out, Kairouz et al. 2021): how many
took part is no secret. The figures are upper bounds, by Opacus:

    rdp   Renyi divergences (Mironov, 2017) with the conversion of Balle et al. (2020)
    prv   numerical composition of privacy loss random variables (Gopi, Lee and Wutschitz, 2021), or the one before
          where that is less
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from slm_export.errors import InputError, MissingComponentError

Accountant = Literal["prv", "rdp"]
Event = tuple[float, float, int]
"""Noise over the clip, probability to take part, and how often."""

_MEANINGLESS = 30.0
"""Epsilon, from which on the quick bound is good enough: the numerical one takes many seconds and much memory there."""
_LOUDEST = 2.0**20
"""Noise over the clip, beyond which nobody looks for more."""
_HALVINGS = 7
"""Of the interval in which noise is searched: to a hundredth."""


@dataclass(frozen=True)
class Ledger:
    """All releases so far."""

    events: tuple[Event, ...] = ()

    @classmethod
    def of(cls, recorded: Any) -> Ledger:
        """Return what `recorded` wrote.

        Raises:
            InputError: it is not that, or says something that cannot be.
        """
        if not isinstance(recorded, Sequence) or isinstance(recorded, str):
            raise InputError("the record of spent privacy is no list of events; restore it from a copy")
        made = cls()
        for event in recorded:
            match event:
                case {
                    "noise": int() | float() as noise,
                    "rate": int() | float() as rate,
                    "times": int() as times,
                }:
                    made = made.plus(float(noise), float(rate), times)
                case _:
                    raise InputError(
                        f"the record of spent privacy has an event that is none ({event!r}); restore it from a copy"
                    )
        return made

    def plus(self, noise: float, rate: float, times: int = 1) -> Ledger:
        """Return the ledger after so many releases more.

        Raises:
            InputError: noise that is none, or a rate that is no probability.
        """
        if not (math.isfinite(noise) and noise > 0):
            raise InputError(f"noise {noise}: it must be more than 0; without noise nothing is private")
        if not 0 < rate <= 1:
            raise InputError(f"rate {rate}: a probability to take part is more than 0 and at most 1")
        if times < 0:
            raise InputError(f"{times} releases: what was released cannot be taken back")
        if times == 0:
            return self
        if self.events and self.events[-1][:2] == (noise, rate):
            return Ledger((*self.events[:-1], (noise, rate, self.events[-1][2] + times)))
        return Ledger((*self.events, (noise, rate, times)))

    @property
    def releases(self) -> int:
        """Number of releases."""
        return sum(times for _, _, times in self.events)

    def epsilon(self, delta: float, accountant: Accountant = "prv") -> float:
        """Return an upper bound of epsilon for this delta; 0 where nothing was released.

        Raises:
            MissingComponentError: Opacus is not installed.
        """
        if not self.events:
            return 0.0
        quick = _epsilon(self.events, delta, "rdp")
        if accountant == "rdp" or quick > _MEANINGLESS:
            return quick
        return min(quick, _epsilon(self.events, delta, "prv"))

    def recorded(self) -> list[dict[str, float | int]]:
        """Return the events as JSON values."""
        return [{"noise": noise, "rate": rate, "times": times} for noise, rate, times in self.events]


@dataclass(frozen=True)
class Budget:
    """What may be spent, declared before anything is."""

    epsilon: float
    delta: float
    accountant: Accountant = "prv"

    def allows(self, ledger: Ledger) -> bool:
        """Whether all of this may be released; asked with the next release in it, before that is made."""
        return ledger.epsilon(self.delta, self.accountant) <= self.epsilon

    def most(self, ledger: Ledger, noise: float, rate: float, limit: int) -> int:
        """Return how many releases more are allowed after those of the ledger, at most ``limit``."""
        if self.allows(ledger.plus(noise, rate, limit)):
            return limit
        allowed, refused = 0, limit
        while refused - allowed > 1:
            middle = (allowed + refused) // 2
            if self.allows(ledger.plus(noise, rate, middle)):
                allowed = middle
            else:
                refused = middle
        return allowed

    def recorded(self, ledger: Ledger) -> dict[str, Any]:
        """Return what was declared and what was spent, as JSON values."""
        return {
            "declared": {"epsilon": self.epsilon, "delta": self.delta},
            "spent": {"epsilon": ledger.epsilon(self.delta, self.accountant), "delta": self.delta},
            "accountant": self.accountant,
            "neighbours": "zero-out",
            "sampling": "poisson",
            "events": ledger.recorded(),
        }


def noise_for(epsilon: float, delta: float, rate: float, times: int, accountant: Accountant = "prv") -> float:
    """Return noise over the clip with which so many releases stay within a budget; the least, to a hundredth.

    Raises:
        InputError: no noise is enough.
        MissingComponentError: Opacus is not installed.
    """
    budget = Budget(epsilon, delta, accountant)

    def is_enough(noise: float) -> bool:
        return budget.allows(Ledger().plus(noise, rate, times))

    enough = 1.0
    while not is_enough(enough):
        enough *= 2
        if enough > _LOUDEST:
            raise InputError(
                f"epsilon = {epsilon:g} with delta = {delta:g} cannot be kept over {times} releases, whatever the "
                f'noise, as far as accountant = "{accountant}" can tell; declare more'
            )
    while is_enough(enough / 2):
        enough /= 2
    too_little = enough / 2
    for _ in range(_HALVINGS):
        middle = (enough + too_little) / 2
        if is_enough(middle):
            enough = middle
        else:
            too_little = middle
    return enough


@lru_cache(maxsize=1024)
def _epsilon(events: tuple[Event, ...], delta: float, accountant: Accountant) -> float:
    _require_opacus()
    from opacus.accountants import create_accountant

    counted = create_accountant(accountant)
    counted.history = list(events)
    with _quiet():
        return float(counted.get_epsilon(delta))


def _require_opacus() -> None:
    try:
        import opacus.accountants  # noqa: F401
    except ImportError as error:
        raise MissingComponentError(
            f"counting privacy needs opacus, which cannot be imported ({error}); "
            "pip install 'slm-export[federated]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to themselves what the accountants say of orders at their bounds, and of logarithms of 0 at a rate of 1."""
    import numpy as np

    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield
