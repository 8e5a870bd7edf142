"""Is what was written good enough? Every artifact opened again, compared, measured, and kept or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slm_export import fidelity
from slm_export.adapters.build import build_adapters
from slm_export.adapters.low_rank import LowRank
from slm_export.checkpoint import Checkpoint
from slm_export.compilation import Plan
from slm_export.delegation import Delegation
from slm_export.errors import GateError
from slm_export.fidelity.judging import checks_of, judge_acceleration
from slm_export.gates import Gates
from slm_export.judge import Judgement, Subject, judge_artifact
from slm_export.optimize import Optimized
from slm_export.parity import Trace, compare, judge_pairs
from slm_export.planning import compiled
from slm_export.progress import Progress
from slm_export.recipe import lowest_bits
from slm_export.results import Artifact, Check, FormatResult, Latency, Pair, Report


class FailedGateError(GateError):
    """A gate failed; ``report`` is what was measured."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def gates_for(plan: Plan, checkpoint: Checkpoint) -> Gates:
    """Built-in thresholds, over them the profile's, over them the user's."""
    defaults = fidelity.default_gates(checkpoint.task, lowest_bits(checkpoint))
    return plan.request.gates.over(plan.profile.gates.over(defaults))


def prove(
    plan: Plan,
    subjects: Sequence[tuple[Artifact, Subject]],
    adapters: Sequence[LowRank],
    models: tuple[Checkpoint, Optimized],
    progress: Progress,
) -> tuple[tuple[FormatResult, ...], tuple[Pair, ...], list[str]]:
    """Open every artifact again, compare it with its source and with the others, and measure it."""
    several = len(subjects) > 1
    results: list[FormatResult] = []
    traces: dict[str, Trace] = {}
    notes: list[str] = []
    source, optimized = models
    with fidelity.references(source, optimized.checkpoint, optimized.steps, len(subjects)) as made_from:
        for artifact, subject in subjects:
            result, judged = _judge(plan, artifact, subject, made_from, several, progress)
            if adapters:
                judged_with = made_from if plan.request.verify else None
                built, checks = build_adapters(adapters, subject, artifact, judged_with, progress)
                result = replace(result, adapters=built, checks=(*result.checks, *checks))
            results.append(result)
            notes += [f"{artifact.format}: {note}" if several else note for note in judged.notes]
            if judged.trace is not None:
                traces[artifact.format] = judged.trace
    pairs: tuple[Pair, ...] = ()
    if traces:
        with progress.stage("compare formats"):
            stored = {a.format: subject.exporter.stored(a.path) for a, subject in subjects}
            pairs = compare(traces, stored, source.task)
    return tuple(results), pairs, notes


def _judge(
    plan: Plan,
    artifact: Artifact,
    subject: Subject,
    references: fidelity.References,
    trace: bool,
    progress: Progress,
) -> tuple[FormatResult, Judgement]:
    latency: Latency | None = None
    delegation: Delegation | None = None
    judged = Judgement((), ())
    checks = size_check(artifact, subject.gates)
    if plan.request.verify:
        judged = judge_artifact(subject, references, progress, trace=trace)
        checks += judged.checks
    if plan.request.bench:
        with progress.stage(f"measure {artifact.format}"):
            if subject.exporter.elsewhere is None:
                latency = plan.target.benchmark(artifact.path, artifact.format, subject.task)
        if latency is not None:
            checks += checks_of(latency, subject.gates, {})
    # No speed: a gate on it is judged without a benchmark too.
    if plan.request.bench or subject.gates.min_accelerated is not None:
        with progress.stage(f"see what accelerates {artifact.format}"):
            delegation = subject.exporter.delegation(artifact.path)
        checks += judge_acceleration(delegation, subject.gates)
    made = FormatResult(
        artifact,
        judged.quality,
        checks,
        latency,
        delegation,
        prediction=compiled.here(references.quantized, artifact.format, latency),
        on_device=compiled.there(references.quantized, artifact.format, plan.profile),
    )
    return made, judged


def size_check(artifact: Artifact, gates: Gates) -> tuple[Check, ...]:
    """Hold an artifact against the size that it may have."""
    return checks_of(
        artifact, Gates(max_bytes=gates.max_bytes), {"bytes": "the file, with the data that belongs to it"}
    )


def refuse_failures(report: Report) -> None:
    """Raise FailedGateError unless every check passed."""
    failed = [
        _words(f"{result.artifact.format}: ", check)
        for result in report.formats
        for check in result.checks
        if not check.passed
    ]
    failed += [_words("", check) for check in judge_pairs(report.parity) if not check.passed]
    if failed:
        message = "the artifact is not good enough, and nothing of it was kept\n" + "\n".join(failed)
        raise FailedGateError(message, report)


def _words(prefix: str, check: Check) -> str:
    figures = ""
    if check.limit is not None and check.value is not None:
        figures = f" is {check.value:.4g}, limit {check.limit:.4g}"
    return f"  {prefix}{check.name}{figures}" + (f": {check.detail}" if check.detail else "")
