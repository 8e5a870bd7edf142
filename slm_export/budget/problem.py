"""A plan with a budget and its model: what headers tell of them, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from slm_export.budget.budget import Budget
from slm_export.budget.choices import Allocation, tables_of
from slm_export.budget.costs import Speed, host_bandwidth
from slm_export.budget.expectation import Expectation, loss_limit
from slm_export.budget.frontier import frontier
from slm_export.checkpoint import Checkpoint, Pass
from slm_export.compilation import Plan, check_gates, context_for
from slm_export.errors import InputError
from slm_export.fidelity.thresholds import default_gates
from slm_export.gates import Gates
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.progress import Progress
from slm_export.recipe import Recipe, make_pass, options_of
from slm_export.source.hub import find_model
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import refuse_large_vocabulary
from slm_export.source.tasks import EMBEDDING, GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer

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
    structure: Recipe = ()
    """Passes that the search put before all of them, to take parts out of the model."""

    @property
    def budget(self) -> Budget:
        """What was asked for."""
        return self.plan.request.budget

    @property
    def first(self) -> Recipe:
        """All passes before the quantizing one."""
        return (*self.structure, *self.before)

    @property
    def decodes(self) -> bool:
        """Whether the model writes text."""
        return self.source.task == GENERATION

    @property
    def measured_here(self) -> bool:
        """Whether the machine at hand is the one that the budget is about."""
        return self.plan.profile.target == "host"

    def recipe(self, allocation: Allocation) -> Recipe:
        """Return the plan's recipe with this allocation."""
        options = {**options_of(self.quantizing), **tables_of(allocation)}
        return (*self.first, make_pass(self.quantizing.name, options, "the budget's recipe"), *self.after)

    def planned(self, expected: Expectation, allocation: Allocation, note: str) -> Plan:
        """Return the plan of an export with this allocation, the budget as its gates."""
        recipe = self.recipe(allocation)
        request = self.plan.request
        text = request.calibration if any(one.calibrated for one in recipe) else None
        gates = self.budget.gates(self.measured_here).over(request.gates)
        if self.structure:
            gates = gates.over(self.plan.profile.gates).over(
                gates_of_fewer_parts(self.budget, self.source.task)
            )
        points = frontier(expected, allocation) if self.decodes else ()
        return replace(
            self.plan,
            request=replace(request, gates=gates, calibration=text),
            recipe=recipe,
            notes=(*self.plan.notes, note),
            frontier=tuple(point.shown for point in points),
        )

    def expectation(self, checkpoint: Checkpoint) -> Expectation:
        """Return what headers tell of a model made from the source."""
        speed = None if self.budget.min_tokens_per_s is None else self._speed()
        formats = [exporter.name for exporter in self.plan.exporters]
        return Expectation.of(checkpoint, formats, speed, _state_bytes(self.plan, checkpoint))

    def _speed(self) -> Speed:
        """Return how fast the machine that the budget is about reads weights."""
        if self.measured_here:
            return Speed(host_bandwidth())
        memory, name = self.plan.profile.memory, self.plan.profile.name
        if memory is None or memory.bandwidth_gb_s is None:
            raise InputError(
                f"--min-tokens-per-s: the memory bandwidth of device {name} is not in its profile, so its speed "
                "cannot be told; leave the option out, or give a --device FILE.toml with memory.bandwidth_gb_s"
            )
        return Speed(_PEAK * memory.bandwidth_gb_s.value * 1e9)


def gates_of_fewer_parts(budget: Budget, task: str) -> Gates:
    """Return what is demanded of a model without some of its parts, beside the limit on quality that was asked for.

    Built-in thresholds follow from bits; where the loss is that of parts, they widen with the limit. On text that the
    source might have written the increase of log perplexity is the KL divergence, which has half of it as room because
    texts differ; and no more than the square root of half the divergence of all probability moves (Pinsker).
    """
    gates = default_gates(task, 4)
    if budget.max_perplexity_ratio is not None and gates.max_kl_mean is not None:
        kl = max(gates.max_kl_mean, 1.5 * math.log(budget.max_perplexity_ratio))
        same = max(0.0, 1 - math.sqrt(kl / 2))
        wide = {"max_kl_mean": kl, "min_top1_agreement": same, "min_greedy_agreement": same}
        return gates.model_copy(update=wide)
    if budget.min_cosine is not None and gates.min_cosine_min is not None:
        least = min(gates.min_cosine_min, 1 - 3 * (1 - budget.min_cosine))
        return gates.model_copy(update={"min_cosine_min": least})
    return gates


def read_problem(plan: Plan, progress: Progress) -> Problem:
    """Read headers, and refuse what cannot be told or judged.

    Raises:
        InputError: the budget contradicts itself, the plan or the task of the model.
    """
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
    return problem


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


def _state_bytes(plan: Plan, checkpoint: Checkpoint) -> int:
    """Return the bytes of the KV cache, in float32."""
    if checkpoint.task != GENERATION:
        return 0
    keys = [
        w.shape[0]
        for name, w in checkpoint.weights.items()
        if name.endswith((".k_proj.weight", ".v_proj.weight"))
    ]
    return 4 * context_for(plan, checkpoint) * sum(keys)
