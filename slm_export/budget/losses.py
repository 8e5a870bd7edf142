"""What is measured before the first export: what the passes before the quantization take away, and what bits cost."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from slm_export.budget.expectation import Expectation, Loss
from slm_export.budget.problem import Problem
from slm_export.budget.sensitivity import TOKENS, count, measure
from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import (
    Calibration,
    own_calibration,
    read_calibration,
    shipped_calibration,
)
from slm_export.compression.distance import Distance
from slm_export.graph.model import build_reference
from slm_export.optimize import optimize
from slm_export.progress import Progress
from slm_export.recipe import options_of
from slm_export.source.load import check_values
from slm_export.source.provenance import source_sha256
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import tokenizer_of


@dataclass(frozen=True)
class Ground:
    """What every measurement of one model stands on."""

    source_sha256: str
    text: Calibration


def ground_of(problem: Problem, progress: Progress) -> Ground:
    """Read the whole model once, and the text."""
    source = problem.source
    with progress.stage("check every weight", total=len(source.weights)) as stage:
        check_values(source, stage.advance)
    with progress.stage("hash the model"):
        sha256 = source_sha256(problem.folder)
    return Ground(sha256, _text(problem, progress))


@dataclass(frozen=True)
class Unquantized:
    """What the passes before the quantization leave."""

    checkpoint: Checkpoint
    text: Calibration
    """In its tokens."""
    base: float
    """What they were measured to take away; 0 without any, and where source and model have other tokens."""


def before_bits(problem: Problem, ground: Ground, progress: Progress) -> Unquantized:
    """Run the passes that come first, and measure what they take away on text that they were not fitted to."""
    source, text = problem.source, ground.text
    if not problem.first:
        return Unquantized(source, text, 0.0)
    made = optimize(problem.first, source, ground.source_sha256, text, None, progress).checkpoint
    if made.vocabulary is not source.vocabulary:
        return Unquantized(made, text.read_by(tokenizer_of(made), made.task, made.positions), 0.0)
    with progress.stage("measure what the passes before cost"):
        return Unquantized(made, text, Distance(source, text.held_out, TOKENS).to(made))


def with_losses(problem: Problem, ground: Ground, made: Unquantized, progress: Progress) -> Expectation:
    """Return what is expected of a model, once it is measured what every choice of bits costs."""
    with progress.stage("measure what bits cost", total=count(made.checkpoint)) as stage:
        made_by = [{"pass": step.name, **options_of(step)} for step in problem.first]
        identity = json.dumps([ground.source_sha256, *made_by]) if made_by else ground.source_sha256
        costs = measure(made.checkpoint, identity, made.text, stage.advance)
    return replace(problem.expectation(made.checkpoint), loss=Loss(costs, made.base))


def _text(problem: Problem, progress: Progress) -> Calibration:
    """Return the text that costs are measured on."""
    source, tokenizer, path = problem.source, problem.tokenizer, problem.plan.request.calibration
    with progress.stage("read the calibration text" if path else "make calibration text") as stage:
        if path is not None:
            return read_calibration(path, tokenizer, source.task, source.positions)
        if source.task != GENERATION:
            return shipped_calibration(tokenizer, source.task, source.positions)
        return own_calibration(build_reference(source), tokenizer, source.positions, stage.advance)
