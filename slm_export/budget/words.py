"""What people are told of a budget: what was chosen and is expected, and what there is instead of the impossible."""

from __future__ import annotations

import math
from collections.abc import Mapping

from slm_export.budget.allocation import Limit
from slm_export.budget.budget import Budget
from slm_export.budget.choices import Allocation
from slm_export.budget.expectation import Expectation, loss_limit
from slm_export.budget.problem import Problem
from slm_export.planning.formats import FORMATS
from slm_export.reports.words import megabytes

_FIGURES = (
    ("perplexity_ratio", "perplexity ratio", 4),
    ("cosine_mean", "mean cosine", 4),
    ("decode_tokens_per_s", "tokens/s", 1),
)


def recipe_words(problem: Problem, expected: Expectation, allocation: Allocation) -> str:
    """Say what was chosen, and what is expected of it."""
    counts: dict[str, int] = {}
    for choice in sorted(allocation.values(), reverse=True):
        counts[str(choice)] = counts.get(str(choice), 0) + 1
    chosen = ", ".join(f"{number} in {name}" for name, number in counts.items())
    first = ""
    if problem.structure and expected.loss is not None:
        first = (
            f"bits alone do not meet it, so parts of the model are taken out first "
            f"({structure_words(problem)}; {expected.loss.base:.4g} of the loss is theirs); "
        )
    told = "; ".join(f"{name} {shown(expected.figures(name, allocation))}" for name in expected.formats)
    return f"the budget's recipe: {first}{chosen} (matrices); expected of it: {told}"


def structure_words(problem: Problem) -> str:
    """Return what the search put before the recipe, such as ``prune-neurons, fraction 0.25``."""
    return " and ".join(
        f"{step.name}, {f'fraction {step.fraction:g}' if hasattr(step, 'fraction') else ''}"
        for step in problem.structure
    )


def impossible_words(limit: Limit, expected: Expectation, budget: Budget, nor: str = "") -> str:
    """Say of a limit that no choice of bits (``nor`` anything else) meets what was asked for and what is nearest."""
    least = expected.least()
    asked, possible = (_in_units(limit, value, budget, expected) for value in (limit.limit, limit.of(least)))
    return (
        f"{limit.name}: {asked} are asked for, but no choice of bits{nor} gets there; the nearest that this model "
        f"can do is about {possible}"
    )


def contradiction_words(expected: Expectation, budget: Budget, best: Allocation | None) -> str:
    """Say what is expected within the limits on cost, and what the quality asked for would take."""
    format = expected.formats[0]
    asked = _quality(budget)
    lines = [f"the budget contradicts itself: {asked} and what it may cost do not go together"]
    if best is not None:
        lines.append(
            f"  within the limits on cost, the best to expect: {shown(expected.figures(format, best))}"
        )
    if (enough := expected.smallest(loss_limit(budget))) is not None:
        lines.append(f"  for {asked}, the least to expect: {shown(expected.figures(format, enough))}")
    return "\n".join(lines)


def nothing_words(budget: Budget) -> str:
    """Say that bits alone do not get to what the model may cost, and that fewer parts take too much away."""
    return (
        f"the budget contradicts itself: for {_quality(budget)} no model with fewer parts was found that costs as "
        "little, and with all of its parts this one does not get there in any bits; allow more of either"
    )


def _quality(budget: Budget) -> str:
    if budget.max_perplexity_ratio is not None:
        return f"a perplexity ratio of {budget.max_perplexity_ratio}"
    return f"a mean cosine of {budget.min_cosine}"


def shown(figures: Mapping[str, float]) -> str:
    """Return figures as people read them."""
    parts = [megabytes(round(figures["bytes"]))]
    parts += [f"{words} {figures[name]:.{digits}f}" for name, words, digits in _FIGURES if name in figures]
    return ", ".join(parts)


def _in_units(limit: Limit, value: float, budget: Budget, expected: Expectation) -> str:
    """Return a value of a limit in the user's terms."""
    if limit.name == "speed":
        assert expected.speed is not None
        assert budget.min_tokens_per_s is not None
        rate = budget.min_tokens_per_s if value == limit.limit else expected.speed.tokens_per_s(value)
        return f"{rate:,.1f} tokens/s"
    if limit.name.startswith("memory"):
        name = limit.name.removeprefix("memory of ")
        value = expected.memory[name] + FORMATS[name].memory * value
    return megabytes(max(0, math.ceil(value)))
