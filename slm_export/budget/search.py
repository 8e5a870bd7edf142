"""The best recipe within a budget: expected, exported, measured, and corrected where the measurement disagrees.

    1. what headers tell: a budget that no allocation fits is refused, in seconds
    2. what every matrix costs at every choice, measured on calibration text (`sensitivity`)
    3. the allocation of bits that is expected to be best (`expectation`, `allocation`)
    4. the whole export, with the budget as gates: what it measures is the verdict
    5. a budget that was missed corrects what is expected, and 3 follows again, a few times at most

The recipe is that of the device profile, with bits and groups of every matrix put into its quantizing pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from slm_export import driver
from slm_export.budget.allocation import Limit
from slm_export.budget.budget import Budget
from slm_export.budget.choices import Allocation, tables_of
from slm_export.budget.costs import FORMATS, Speed, host_bandwidth
from slm_export.budget.expectation import Expectation, Loss, loss_limit
from slm_export.budget.frontier import frontier
from slm_export.budget.sensitivity import TOKENS, count, measure
from slm_export.checkpoint import Checkpoint, Pass
from slm_export.compilation import Plan, check_gates, context_for
from slm_export.compression.calibration import (
    Calibration,
    own_calibration,
    read_calibration,
    shipped_calibration,
)
from slm_export.compression.distance import Distance
from slm_export.errors import InputError
from slm_export.graph.model import build_reference
from slm_export.optimize import optimize
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.progress import Progress
from slm_export.recipe import Recipe, make_pass, options_of
from slm_export.reports.words import megabytes
from slm_export.results import Report
from slm_export.source.hub import find_model
from slm_export.source.load import check_values, load_checkpoint
from slm_export.source.provenance import refuse_large_vocabulary, source_sha256
from slm_export.source.tasks import EMBEDDING, GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer, tokenizer_of

_DOUBT = 1.5
"""What is expected to miss the quality asked for by less than this factor is tried: expectations are not exact."""
ROUNDS = 4
"""Exports at most, of which the last one decides."""
_PEAK = 0.7
"""Share of a device's memory bandwidth that decoding gets. ExecuTorch's README has 50.2 tokens/s of 1,083 MiB on a
OnePlus 12, whose memory reads 76.8 GB/s: 0.74."""


@dataclass(frozen=True)
class Problem:
    """A plan with a budget, and what is known of its model."""

    plan: Plan
    folder: Path
    source: Checkpoint
    tokenizer: SourceTokenizer
    before: Recipe
    """Passes that come before the quantizing one."""
    quantizing: Pass
    after: Recipe

    @property
    def budget(self) -> Budget:
        """What was asked for."""
        return self.plan.request.budget

    def recipe(self, allocation: Allocation) -> Recipe:
        """Return the plan's recipe with this allocation."""
        options = {**options_of(self.quantizing), **tables_of(allocation)}
        return (*self.before, make_pass(self.quantizing.name, options, "the budget's recipe"), *self.after)

    def planned(self, expected: Expectation, allocation: Allocation, note: str) -> Plan:
        """Return the plan of an export with this allocation, the budget as its gates."""
        recipe = self.recipe(allocation)
        request = self.plan.request
        text = request.calibration if any(one.calibrated for one in recipe) else None
        gates = self.budget.gates(_measured_here(self.plan)).over(request.gates)
        request = replace(request, gates=gates, calibration=text)
        points = frontier(expected, allocation) if self.source.task == GENERATION else ()
        return replace(
            self.plan,
            request=request,
            recipe=recipe,
            notes=(*self.plan.notes, note),
            frontier=tuple(point.shown for point in points),
        )


def export(plan: Plan, progress: Progress) -> tuple[Report, Path]:
    """Find the recipe, export with it, and prove it.

    Raises:
        InputError: the budget contradicts itself or the model, which is told before anything is made.
        FailedGateError: what was measured is not within the budget, nor what was tried after it.
    """
    problem, expected = read_problem(plan, progress)
    plan.ready()
    expected, _ = with_costs(problem, expected, progress)
    allocation = first_allocation(expected, problem.budget)
    for left in reversed(range(ROUNDS)):
        note = _words(expected, allocation)
        progress.say(note)
        try:
            return driver.export(problem.planned(expected, allocation, note), progress)
        except driver.FailedGateError as error:
            if not left or not _of_the_budget(error.report, problem.budget):
                raise
            expected = expected.corrected(allocation, error.report.formats)
            found = _next(expected, problem.budget, allocation)
            if found is None:
                raise
            allocation = found
    raise AssertionError


def read_problem(plan: Plan, progress: Progress) -> tuple[Problem, Expectation]:
    """Read headers, and refuse what they show to be impossible."""
    check_gates(plan)
    folder = find_model(plan.model, plan.request.revision)
    with progress.stage("read the model"):
        source = load_checkpoint(folder)
        tokenizer = SourceTokenizer.load(folder)
    refuse_large_vocabulary(source, tokenizer)
    for exporter in plan.exporters:
        exporter.check(source)
    problem = Problem(plan, folder, source, tokenizer, *_split(plan.recipe))
    _refuse_what_cannot_be_told(problem)
    expected = _expectation(problem, source)
    if not any(step.structural for step in problem.before):  # of what those leave, headers tell nothing
        refuse_impossible(expected, problem.budget)
    return problem, expected


def _split(recipe: Recipe) -> tuple[Recipe, Pass, Recipe]:
    """Return the passes before the one that quantizes, that one, and those behind it."""
    places = [place for place, step in enumerate(recipe) if step.quantizes]
    if not places:
        return recipe, GroupQuantize(), ()
    if len(places) > 1:
        names = ", ".join(recipe[place].name for place in places)
        raise InputError(
            f"a budget chooses the bits of one quantizing pass, but the recipe has several ({names})"
        )
    step = recipe[places[0]]
    known = {field.name for field in fields(step)}  # type: ignore[arg-type]
    if not {"bits_by_tensor", "group_by_tensor"} <= known:
        raise InputError(f"a budget chooses the bits of every matrix, which {step.name} does not take")
    return recipe[: places[0]], step, recipe[places[0] + 1 :]


def _refuse_what_cannot_be_told(problem: Problem) -> None:
    budget, plan, task = problem.budget, problem.plan, problem.source.task
    budget.check()
    if plan.request.quantization.overrides():
        raise InputError(
            "a budget chooses bits and groups itself: leave out --bits and its kin, or the budget"
        )
    if task != GENERATION and (
        budget.max_perplexity_ratio is not None or budget.min_tokens_per_s is not None
    ):
        raise InputError(
            f"{problem.source.name}: perplexity and tokens/s are of models that write text; for an encoder of "
            "embeddings give --min-cosine"
        )
    if task != EMBEDDING and budget.min_cosine is not None:
        raise InputError(f"{problem.source.name}: --min-cosine is of models whose output is an embedding")
    quality = loss_limit(budget) is not None
    if quality and not plan.request.verify:
        raise InputError("a budget on quality is judged by measuring it: leave out --no-verify")
    timed = budget.max_memory is not None or budget.min_tokens_per_s is not None
    if timed and not plan.request.bench:
        raise InputError("a budget on memory or speed is judged by measuring it: leave out --no-bench")


def _measured_here(plan: Plan) -> bool:
    return plan.profile.target == "host"


def _expectation(problem: Problem, checkpoint: Checkpoint) -> Expectation:
    speed = None if problem.budget.min_tokens_per_s is None else _speed(problem.plan)
    formats = [exporter.name for exporter in problem.plan.exporters]
    return Expectation.of(checkpoint, formats, speed, _state_bytes(problem, checkpoint))


def _speed(plan: Plan) -> Speed:
    """Return how fast the machine that the budget is about reads weights."""
    if _measured_here(plan):
        return Speed(host_bandwidth())
    memory = plan.profile.memory
    if memory is None or memory.bandwidth_gb_s is None:
        raise InputError(
            f"--min-tokens-per-s: the memory bandwidth of device {plan.profile.name} is not in its profile, so its "
            "speed cannot be told; leave the option out, or give a --device FILE.toml with memory.bandwidth_gb_s"
        )
    return Speed(_PEAK * memory.bandwidth_gb_s.value * 1e9)


def _state_bytes(problem: Problem, checkpoint: Checkpoint) -> int:
    """Return the bytes of the KV cache, in float32."""
    if checkpoint.task != GENERATION:
        return 0
    keys = [
        w.shape[0]
        for name, w in checkpoint.weights.items()
        if name.endswith((".k_proj.weight", ".v_proj.weight"))
    ]
    return 4 * context_for(problem.plan, checkpoint) * sum(keys)


def refuse_impossible(expected: Expectation, budget: Budget) -> None:
    """Raise InputError where a limit on cost is below what the least allocation takes for certain."""
    least = expected.least()
    for limit in expected.limits(budget):
        sure = limit.of(least) - limit.fixed
        if sure <= limit.limit:
            continue
        asked, possible = (
            _in_units(limit, value, budget, expected) for value in (limit.limit, limit.of(least))
        )
        raise InputError(
            f"{limit.name}: {asked} are asked for, but no choice of bits gets there; the nearest that this model can "
            f"do is about {possible} (passes that take parts out, such as drop-layers, go into a profile's recipe)"
        )


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


@dataclass(frozen=True)
class Measured:
    """What was needed to measure costs, for who measures more."""

    source_sha256: str
    text: Calibration


def with_costs(problem: Problem, expected: Expectation, progress: Progress) -> tuple[Expectation, Measured]:
    """Measure what every choice costs."""
    source = problem.source
    with progress.stage("check every weight", total=len(source.weights)) as stage:
        check_values(source, stage.advance)
    with progress.stage("hash the model"):
        sha256 = source_sha256(problem.folder)
    given = text = _text(problem, progress)
    checkpoint, base = source, 0.0
    if problem.before:
        checkpoint = optimize(problem.before, source, sha256, text, None, progress).checkpoint
        expected = _expectation(problem, checkpoint)
        refuse_impossible(expected, problem.budget)
        if checkpoint.vocabulary is not source.vocabulary:
            text = text.read_by(tokenizer_of(checkpoint), source.task, source.positions)
        else:
            with progress.stage("measure what the passes before cost"):
                base = Distance(source, text.held_out, TOKENS).to(checkpoint)
    with progress.stage("measure what bits cost", total=count(checkpoint)) as stage:
        made_by = [{"pass": step.name, **options_of(step)} for step in problem.before]
        identity = json.dumps([sha256, *made_by]) if made_by else sha256
        costs = measure(checkpoint, identity, text, stage.advance)
    return replace(expected, loss=Loss(costs, base)), Measured(sha256, given)


def _text(problem: Problem, progress: Progress) -> Calibration:
    """Return the text that costs are measured on."""
    source, tokenizer, path = problem.source, problem.tokenizer, problem.plan.request.calibration
    with progress.stage("read the calibration text" if path else "make calibration text") as stage:
        if path is not None:
            return read_calibration(path, tokenizer, source.task, source.positions)
        if source.task != GENERATION:
            return shipped_calibration(tokenizer, source.task, source.positions)
        return own_calibration(build_reference(source), tokenizer, source.positions, stage.advance)


def first_allocation(expected: Expectation, budget: Budget) -> Allocation:
    """Return the first allocation to try; InputError where cost and quality contradict each other."""
    found = expected.allocate(budget)
    if found is None and budget.limits_cost:
        # What is certain was seen before; what is guessed of the program around the weights may be wrong.
        return expected.least()
    limit = loss_limit(budget)
    if found is None or (limit is not None and _loss(expected, found) > _DOUBT * limit):
        raise InputError(_contradiction(expected, budget, found))
    return found


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


def _contradiction(expected: Expectation, budget: Budget, best: Allocation | None) -> str:
    """Say what is expected within the limits on cost, and what the quality asked for would take."""
    format = expected.formats[0]
    asked = (
        f"a perplexity ratio of {budget.max_perplexity_ratio}"
        if budget.max_perplexity_ratio
        else (f"a mean cosine of {budget.min_cosine}")
    )
    lines = [f"the budget contradicts itself: {asked} and what it may cost do not go together"]
    if best is not None:
        lines.append(
            f"  within the limits on cost, the best to expect: {_shown(expected.figures(format, best))}"
        )
    if (enough := expected.smallest(loss_limit(budget))) is not None:
        lines.append(f"  for {asked}, the least to expect: {_shown(expected.figures(format, enough))}")
    return "\n".join(lines)


def _of_the_budget(report: Report, budget: Budget) -> bool:
    """Whether all that failed is what another allocation may mend."""
    mendable = {"bytes", "model_rss_mb", "decode_tokens_per_s"}
    if loss_limit(budget) is not None:
        mendable |= {"perplexity_ratio", "kl_mean", "kl_p99", "kl_max", "top1_agreement", "greedy_agreement"}
        mendable |= {"cosine_mean", "cosine_min"}
    failed = {check.name for result in report.formats for check in result.checks if not check.passed}
    return failed <= mendable


def _words(expected: Expectation, allocation: Allocation) -> str:
    """Say what was chosen, and what is expected of it."""
    counts: dict[str, int] = {}
    for choice in sorted(allocation.values(), reverse=True):
        counts[str(choice)] = counts.get(str(choice), 0) + 1
    chosen = ", ".join(f"{number} in {name}" for name, number in counts.items())
    told = "; ".join(f"{name} {_shown(expected.figures(name, allocation))}" for name in expected.formats)
    return f"the budget's recipe: {chosen} (matrices); expected of it: {told}"


def _shown(figures: Mapping[str, float]) -> str:
    """Return figures as people read them."""
    parts = [megabytes(round(figures["bytes"]))]
    for name, words, digits in (
        ("perplexity_ratio", "perplexity ratio", 4),
        ("cosine_mean", "mean cosine", 4),
        ("decode_tokens_per_s", "tokens/s", 1),
    ):
        if name in figures:
            parts.append(f"{words} {figures[name]:.{digits}f}")
    return ", ".join(parts)
