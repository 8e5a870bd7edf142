"""The best recipe within a budget: expected, exported, measured, and corrected where the measurement disagrees.

    1. what headers tell: a budget that nothing fits is refused, in seconds (`problem`, `refuse_impossible`)
    2. what every matrix costs at every choice, on calibration text (`losses`, `sensitivity`)
    3. the allocation of bits that is expected to be best (`expectation`, `allocation`)
    4. the whole export, with the budget as gates: what it measures is the verdict
    5. a budget that was missed corrects what is expected, and 3 follows again, a few times at most
    6. where bits alone do not meet it and it limits quality, the same with fewer parts (`structure`)

The recipe is that of the device profile, with bits and groups of every matrix put into its quantizing pass.
"""

from __future__ import annotations

from pathlib import Path

from slm_export import driver
from slm_export.budget.budget import Budget
from slm_export.budget.choices import Allocation
from slm_export.budget.expectation import Expectation, loss_limit
from slm_export.budget.losses import before_bits, ground_of, with_losses
from slm_export.budget.problem import Problem, read_problem
from slm_export.budget.structure import kinds_of, narrower
from slm_export.budget.words import contradiction_words, impossible_words, nothing_words, recipe_words
from slm_export.compilation import Plan
from slm_export.errors import InputError
from slm_export.progress import Progress
from slm_export.proof import FailedGateError
from slm_export.results import Report

_DOUBT = 1.5
"""What is expected to miss the quality asked for by less than this factor is tried: expectations are not exact."""
ROUNDS = 4
"""Exports at most, of which the last one decides."""


def export(plan: Plan, progress: Progress) -> tuple[Report, Path]:
    """Find the recipe, export with it, and prove it.

    Raises:
        InputError: the budget contradicts itself or the model, which is told before anything is made.
        FailedGateError: what was measured is not within the budget, nor what was tried after it.
    """
    problem = read_problem(plan, progress)
    by_bits = refuse_impossible(problem)
    plan.ready()
    ground = ground_of(problem, progress)
    missed: InputError | FailedGateError | None = None
    if by_bits:
        expected = with_losses(problem, ground, before_bits(problem, ground, progress), progress)
        refuse_too_large(expected, problem.budget)
        try:
            return _exported(problem, expected, progress)
        except (ContradictionError, FailedGateError) as error:
            if not _structure_may_help(problem, error):
                raise
            missed = error
    found = narrower(problem, ground, progress)
    if found is not None:
        return _exported(*found, progress)
    raise missed or ContradictionError(nothing_words(problem.budget))


class ContradictionError(InputError):
    """Cost and quality asked for do not go together."""


def refuse_impossible(problem: Problem) -> bool:
    """Return whether headers let bits alone meet the limits on cost; InputError where nothing does."""
    if any(step.structural for step in problem.before):  # of what those leave, headers tell nothing
        return True
    budget = problem.budget
    expected = problem.expectation(problem.source)
    limit = expected.missed(budget)
    if limit is None:
        return True
    words = impossible_words(limit, expected, budget)
    if loss_limit(budget) is None:
        option = "--max-perplexity-ratio 1.2" if problem.decodes else "--min-cosine 0.9"
        raise InputError(
            f"{words}. Parts of the model (neurons, key-value groups, layers) are taken out only within a limit on "
            f"quality: add one, such as {option}"
        )
    shapes = [each.shapes for kind in kinds_of(problem.source, problem.before) for each in kind]
    smaller = [problem.expectation(each) for each in shapes]
    if any(one.missed(budget) is None for one in smaller):
        return False
    least = min(smaller, key=lambda one: one.size(one.formats[0], one.least()), default=expected)
    raise InputError(impossible_words(least.missed(budget) or limit, least, budget, " and no fewer parts"))


def refuse_too_large(expected: Expectation, budget: Budget) -> None:
    """Raise InputError where the passes of the recipe leave more than the budget has room for."""
    if (limit := expected.missed(budget)) is not None:
        raise InputError(impossible_words(limit, expected, budget))


def first_allocation(expected: Expectation, budget: Budget) -> Allocation:
    """Return the first allocation to try; ContradictionError where cost and quality do not go together."""
    found = expected.allocate(budget)
    if found is None and budget.limits_cost:
        # What is certain was seen before; what is guessed of the program around the weights may be wrong.
        return expected.least()
    limit = loss_limit(budget)
    if found is None or (limit is not None and _loss(expected, found) > _DOUBT * limit):
        raise ContradictionError(contradiction_words(expected, budget, found))
    return found


def _exported(problem: Problem, expected: Expectation, progress: Progress) -> tuple[Report, Path]:
    """Export what is expected to be best, and again what a failed gate of the budget teaches."""
    allocation = first_allocation(expected, problem.budget)
    for left in reversed(range(ROUNDS)):
        note = recipe_words(problem, expected, allocation)
        progress.say(note)
        try:
            return driver.export(problem.planned(expected, allocation, note), progress)
        except FailedGateError as error:
            if not left or not _of_the_budget(error.report, problem.budget):
                raise
            expected = expected.corrected(allocation, error.report.formats)
            found = _next(expected, problem.budget, allocation)
            if found is None:
                raise
            allocation = found
    raise AssertionError


def _structure_may_help(problem: Problem, error: InputError | FailedGateError) -> bool:
    """Whether a model with fewer parts may be within the budget: only cost and quality together ask for one."""
    budget = problem.budget
    if not budget.limits_cost or loss_limit(budget) is None or not kinds_of(problem.source, problem.before):
        return False
    return not isinstance(error, FailedGateError) or _of_the_budget(error.report, budget)


def _next(expected: Expectation, budget: Budget, last: Allocation) -> Allocation | None:
    """Return what to try after a correction; None where nothing else is expected to be within the budget."""
    found = expected.allocate(budget)
    limit = loss_limit(budget)
    if found is None or found == last or (limit is not None and _loss(expected, found) > limit):
        return None
    return found


def _loss(expected: Expectation, allocation: Allocation) -> float:
    assert expected.loss is not None
    return expected.loss.of(allocation)


def _of_the_budget(report: Report, budget: Budget) -> bool:
    """Whether all that failed is what another allocation may mend."""
    mendable = {"bytes", "model_rss_mb", "decode_tokens_per_s"}
    if loss_limit(budget) is not None:
        mendable |= {"perplexity_ratio", "kl_mean", "kl_p99", "kl_max", "top1_agreement", "greedy_agreement"}
        mendable |= {"cosine_mean", "cosine_min"}
    failed = {check.name for result in report.formats for check in result.checks if not check.passed}
    return failed <= mendable
