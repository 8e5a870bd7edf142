"""One choice for every matrix: the best within limits, by SciPy's solver of mixed-integer linear programs.

    minimize    sum of the costs of the choices made
    subject to  one choice per matrix
                fixed + sum of what they take  <=  limit        for every limit

Exact, to the solver's gap: a few hundred matrices with half a dozen choices each take it less than a second (HiGHS;
Huangfu and Hall, "Parallelizing the dual revised simplex method", 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slm_export.budget.choices import Allocation, Choice, Options
from slm_export.native_log import off_stdout

Weights = Mapping[str, Mapping[Choice, float]]
"""Of every matrix what each of its choices takes."""
_GAP = 1e-4
_SECONDS = 60.0


@dataclass(frozen=True)
class Limit:
    """A sum over the choices that may not exceed something."""

    name: str
    """As errors name it: ``size of executorch``."""
    takes: Weights
    fixed: float
    """What is taken whatever is chosen."""
    limit: float

    def of(self, allocation: Allocation) -> float:
        """Return what an allocation takes."""
        return self.fixed + sum(self.takes[name][choice] for name, choice in allocation.items())

    def least(self, options: Options) -> float:
        """Return what is taken when every matrix takes as little as it can."""
        return self.fixed + sum(
            min(self.takes[name][c] for c in choices) for name, choices in options.items()
        )

    def moved(self, limit: float) -> Limit:
        """Return the same sum with another limit."""
        return replace(self, limit=limit)


def solve(options: Options, objective: Weights, limits: Sequence[Limit]) -> dict[str, Choice] | None:
    """Return the choices of least cost within all limits; None if there are none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    places = [(name, choice) for name, choices in options.items() for choice in choices]
    if not places:
        return {} if all(limit.fixed <= limit.limit for limit in limits) else None
    rows = {name: row for row, name in enumerate(options)}
    ones = csr_array(
        (np.ones(len(places)), ([rows[name] for name, _ in places], range(len(places)))),
        shape=(len(rows), len(places)),
    )
    constraints = [LinearConstraint(ones, 1, 1)]
    for limit in limits:
        takes = np.array([limit.takes[name][choice] for name, choice in places], dtype=float)
        scale = max(takes.max(), 1e-30)
        constraints.append(
            LinearConstraint(takes[None] / scale, -np.inf, (limit.limit - limit.fixed) / scale)
        )
    costs = np.array([objective[name][choice] for name, choice in places], dtype=float)
    with off_stdout():  # HiGHS leaves a line there now and then, whatever it is told
        found = milp(
            costs / max(costs.max(), 1e-30),
            integrality=np.ones(len(places)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if found.x is None:
        return None
    return {name: choice for (name, choice), x in zip(places, found.x, strict=True) if x > 0.5}
