"""What is measured before the first export: what the passes before the quantization take away, and what bits cost."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from slm_export.budget.expectation import Expectation, Loss
from slm_export.budget.problem import Problem
from slm_export.budget.sensitivity import TOKENS, count, measure
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


def with_losses(problem: Problem, ground: Ground, progress: Progress) -> Expectation:
    """Return what is expected once it is measured what every choice costs, behind the passes that come first."""
    checkpoint, text, base = problem.source, ground.text, 0.0
    if problem.first:
        made = optimize(problem.first, checkpoint, ground.source_sha256, text, None, progress)
        checkpoint = made.checkpoint
        if checkpoint.vocabulary is not problem.source.vocabulary:
            text = text.read_by(tokenizer_of(checkpoint), checkpoint.task, checkpoint.positions)
        else:
            with progress.stage("measure what the passes before cost"):
                base = Distance(problem.source, text.held_out, TOKENS).to(checkpoint)
    with progress.stage("measure what bits cost", total=count(checkpoint)) as stage:
        made_by = [{"pass": step.name, **options_of(step)} for step in problem.first]
        identity = json.dumps([ground.source_sha256, *made_by]) if made_by else ground.source_sha256
        costs = measure(checkpoint, identity, text, stage.advance)
    return replace(problem.expectation(checkpoint), loss=Loss(costs, base))


def _text(problem: Problem, progress: Progress) -> Calibration:
    """Return the text that costs are measured on."""
    source, tokenizer, path = problem.source, problem.tokenizer, problem.plan.request.calibration
    with progress.stage("read the calibration text" if path else "make calibration text") as stage:
        if path is not None:
            return read_calibration(path, tokenizer, source.task, source.positions)
        if source.task != GENERATION:
            return shipped_calibration(tokenizer, source.task, source.positions)
        return own_calibration(build_reference(source), tokenizer, source.positions, stage.advance)
