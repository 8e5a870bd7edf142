"""Models with fewer parts, for a budget that bits alone do not meet: neurons, key-value groups, layers.

A structure is a pass in front of the recipe. A few of each kind are tried, the mildest first: what headers say cannot
fit is left out, the pass makes the others, and what it cost is measured on text that it was not fitted to. Bits are
then allocated within each, and the least loss expected of all is what is exported. A kind is not tried further once
what it takes away is alone more than the loss allowed, or than another loses in all.

Only within a limit on quality: a smaller model than bits can make is a worse one, and how much worse is the user's to
say. Tokens are not among the parts, because without them a model can say less: `trim-vocabulary` goes into a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from slm_export.budget.budget import Budget
from slm_export.budget.expectation import Expectation, loss_limit
from slm_export.budget.losses import Ground, before_bits, with_losses
from slm_export.budget.problem import Problem
from slm_export.checkpoint import Checkpoint, Pass
from slm_export.compression.depth import stacks_of, with_layers
from slm_export.compression.geometry import Parts, attentions, mlps
from slm_export.errors import InputError
from slm_export.optimizers.drop_layers import DropLayers
from slm_export.optimizers.prune_kv_groups import PruneKvGroups
from slm_export.optimizers.prune_neurons import PruneNeurons
from slm_export.progress import Progress
from slm_export.weights import GROUPS, Dense

_FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
_KINDS: tuple[type[PruneNeurons] | type[PruneKvGroups] | type[DropLayers], ...] = (
    PruneNeurons,
    PruneKvGroups,
    DropLayers,
)


@dataclass(frozen=True)
class Structure:
    """A pass that takes parts out, and the shapes that are left of the model, as far as headers tell."""

    step: Pass
    shapes: Checkpoint
    """Cannot be read: which parts go is measured."""


def kinds_of(source: Checkpoint, recipe: Sequence[Pass]) -> tuple[tuple[Structure, ...], ...]:
    """Return the structures that a model allows, by kind, the mildest first; none if the recipe has its own."""
    if any(step.structural for step in recipe):
        return ()
    return tuple(found for kind in _KINDS if (found := tuple(_of_kind(kind, source))))


def narrower(problem: Problem, ground: Ground, progress: Progress) -> tuple[Problem, Expectation] | None:
    """Return the problem with the structure that is expected to lose least within its budget; None without any."""
    limit = loss_limit(problem.budget)
    assert limit is not None
    best: tuple[float, Problem, Expectation] | None = None
    for kind in kinds_of(problem.source, problem.before):
        of_kind = math.inf
        for structure in kind:
            trial = replace(problem, structure=(structure.step,))
            if trial.expectation(structure.shapes).missed(problem.budget) is not None:
                continue
            made = before_bits(trial, ground, progress)
            if made.base >= (limit if best is None else min(limit, best[0])):
                break
            expected = with_losses(trial, ground, made, progress)
            loss = _least_loss(expected, problem.budget)
            if best is None or loss < best[0]:
                best = (loss, trial, expected) if loss < math.inf else best
            if loss > of_kind:
                break
            of_kind = loss
    return None if best is None else best[1:]


def _least_loss(expected: Expectation, budget: Budget) -> float:
    """Return the loss of the best allocation; infinite where none is within the limits on cost."""
    found = expected.allocate(budget)
    assert expected.loss is not None
    return math.inf if found is None else expected.loss.of(found)


def _of_kind(
    kind: type[PruneNeurons] | type[PruneKvGroups] | type[DropLayers], source: Checkpoint
) -> Iterator[Structure]:
    seen = set()
    for fraction in _FRACTIONS:
        step = kind(fraction=fraction)
        try:
            step.check(source)
            shapes = _shapes(step, source)
        except InputError:  # none of its parts are known, or so small a share is no part at all
            continue
        if shapes.parameters not in seen:
            seen.add(shapes.parameters)
            yield Structure(step, shapes)


def _shapes(step: PruneNeurons | PruneKvGroups | DropLayers, source: Checkpoint) -> Checkpoint:
    if isinstance(step, DropLayers):
        count, _ = stacks_of(source, step.name)
        left = count - max(1, round(step.fraction * count))
        return with_layers(source, range(left), step.name)
    find = mlps if isinstance(step, PruneNeurons) else attentions
    made: dict[str, Dense] = {}
    for parts in find(source, step.name):
        # Layers lose in multiples, not all the same: rounded up, so that nothing is left out that might fit.
        multiple = max((g for g in GROUPS if not parts.count % g and g < parts.count), default=1)
        number = math.ceil(step.fraction * parts.count / multiple) * multiple
        made |= _without(source, parts, min(number, parts.count - multiple))
    return source.with_weights(made)


def _without(source: Checkpoint, parts: Parts, number: int) -> dict[str, Dense]:
    """Return the matrices of a layer in the shapes that they have without so many parts."""
    shapes = {f"{name}.weight": (-number * rows.shape[1], 0) for name, rows in parts.rows.items()}
    shapes[f"{parts.out}.weight"] = (0, -number * parts.columns.shape[1])
    made = {}
    for name, (rows, columns) in shapes.items():
        weight = source.weights[name]
        if isinstance(weight, Dense):
            shape = (weight.shape[0] + rows, weight.shape[1] + columns)
            made[name] = Dense(shape, weight.dtype, _unread)
    return made


def _unread() -> NoReturn:
    raise AssertionError("only the shape of this weight is known")
