"""``slm-export reason``: a teacher writes step-by-step solutions, and a child is tuned on those that prove right."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_export.bundles.bundle import staged
from slm_export.bundles.checksums import sha256_file
from slm_export.toolchain import versions
from slm_export.errors import InputError
from slm_export.learning import finishing
from slm_export.learning.artifact_scores import score_bundle
from slm_export.learning.chats import whole_text
from slm_export.learning.checker import Checker, Limits
from slm_export.learning.endpoint import Endpoint, is_url
from slm_export.learning.judging import Judge, known_answers
from slm_export.learning.local_teacher import LocalTeacher
from slm_export.learning.models import Model, load, save
from slm_export.learning.outcome import Outcome, Row, write_outcome
from slm_export.learning.places import place
from slm_export.learning.problems import Problems, joined, part, read_problems
from slm_export.learning.processes import world
from slm_export.learning.reason_settings import Reasoning
from slm_export.learning.scoring import Score
from slm_export.learning.teaching import ReasoningTeacher
from slm_export.learning.traces import Selection, Trace
from slm_export.learning.tuning import Collected, Lessons, child_of, collect, lessons, scored_once, tune
from slm_export.learning.updating import refuse_adapters_on_a_grid, settle
from slm_export.progress import Progress
from slm_export.source.hub import find_model
from slm_export.source.licences import licence_of
from slm_export.source.provenance import source_sha256

TRACES = "traces.jsonl"
"""In the child's folder: what it was tuned on."""
REJECTED = "rejected.jsonl"
"""In the child's folder: some of each kind of solutions that it was not tuned on."""
HELD_OUT = "held_out.jsonl"
"""In the child's folder: the problems that it was scored on."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    teacher: str
    """A URL, a folder, or the name of a model on the hub."""
    model: str
    problems: Path
    out: Path
    held_out: Path | None = None
    """Problems to judge by; None: a part of ``problems``."""
    held_out_count: int | None = None
    checker: str | None = None
    """A command that judges; None: the known answers do."""
    checker_limits: Limits = field(default_factory=Limits)
    teacher_model: str | None = None
    """Its name behind an endpoint; None: the only one there."""
    temperature: float = 0.7
    max_tokens: int = 1024
    timeout_s: float = 120.0
    at_once: int = 4
    data_licence: str | None = None
    settings: Reasoning = field(default_factory=Reasoning)
    force: bool = False


def reason(request: Request, progress: Progress) -> tuple[Outcome, Path]:
    """Tune a child, and put it in its place; nothing is left there unless all went well.

    Raises:
        SlmExportError: whatever a user can cause or mend.
    """
    began = time.monotonic()
    _refuse_many_processes()
    refuse_adapters_on_a_grid(request.settings.low_rank, request.settings.grid)
    problems = _problems(request)
    judge = _judge(request, problems)
    folder = find_model(request.model, None)
    with staged(request.out, request.force) as staging:
        with progress.stage("read the child"):
            child = child_of(folder)
            _refuse_long(child, request)
        given, teacher = _collected(request, child, problems, judge, progress)
        taught = lessons(given.selection.traces, child.tokenizer, request.settings.training.length)
        with place(_key(request, folder, problems, taught, judge)) as work:
            settings = request.settings
            before = scored_once(work, "before", child, problems.held_out, judge, settings, progress)
            curve = tune(child, taught, settings, work, progress)
            save(child, staging.path, settle(child, settings.grid, work))
            after = scored_once(
                work, "after", load(staging.path), problems.held_out, judge, settings, progress
            )
            _write_beside(child, problems, given, taught, folder, staging.path)
            rows = _rows(child, given.score, before, after)
            outcome = Outcome(
                by="reason",
                model=request.out.resolve().name,
                rows=rows,
                curves={"reason": curve},
                settings=_settings(request, judge),
                data={
                    **given.selection.as_json(),
                    "too_long": taught.too_long,
                    "examples": len(taught.examples),
                },
                held_out=_held_out(problems, given.score, before, after)
                | finishing.text_for_exports(staging.path),
                lineage=_lineage(folder, teacher, request),
                licence=licence_of(folder),
                data_licence=request.data_licence,
                notes=_notes(given.selection, taught, judge),
                seconds=time.monotonic() - began,
                toolchain=versions(finishing.TOOLS),
            )
            write_outcome(outcome, staging.path)
            out = staging.commit()
            work.done()
    return outcome, out


def artifact_scores(bundle: Path, request: Request, progress: Progress) -> dict[str, Score | None]:
    """Return how many of the same held-out problems the artifacts of a bundle solve, by format."""
    problems = _problems(request)
    judge = _judge(request, problems)
    return score_bundle(bundle, problems.held_out, judge, request.settings.answer_tokens, progress)


def _refuse_many_processes() -> None:
    if world() > 1:
        raise InputError(
            "reason runs in one process: every process would ask the teacher, and generate, for itself; start it "
            "without torchrun"
        )


def _problems(request: Request) -> Problems:
    needed = request.checker is None
    read = read_problems(request.problems, answers_needed=needed)
    if request.held_out is None:
        return part(read, request.held_out_count)
    if request.held_out_count is not None:
        raise InputError("give --held-out FILE or --held-out-problems N, not both")
    return joined(read, read_problems(request.held_out, answers_needed=needed))


def _judge(request: Request, problems: Problems) -> Judge:
    if request.checker is None:
        return known_answers
    checker = Checker(request.checker, request.checker_limits)
    checker.try_out(problems.training[0])
    return checker


def _teacher(request: Request) -> ReasoningTeacher:
    how: dict[str, Any] = {"temperature": request.temperature, "max_tokens": request.max_tokens}
    if is_url(request.teacher):
        return Endpoint(
            request.teacher,
            request.teacher_model,
            timeout_s=request.timeout_s,
            at_once=request.at_once,
            **how,
        )
    if request.teacher_model is not None:
        raise InputError("--teacher-model names a model behind an endpoint, and the teacher is a folder")
    return LocalTeacher(find_model(request.teacher, None), **how)


def _collected(
    request: Request, child: Model, problems: Problems, judge: Judge, progress: Progress
) -> tuple[Collected, dict[str, Any]]:
    """Return what the teacher gave, and who it is; one in a folder is out of memory again then."""
    teacher = _teacher(request)
    given = collect(teacher, problems, judge, request.settings, child.tokenizer, progress)
    return given, dict(teacher.identity)


def _refuse_long(child: Model, request: Request) -> None:
    length = request.settings.training.length
    if child.positions is not None and length > child.positions:
        raise InputError(
            f"--length {length} is longer than the {child.positions} positions of {child.folder.name}"
        )


def _key(request: Request, folder: Path, problems: Problems, taught: Lessons, judge: Judge) -> dict[str, Any]:
    """Return what decides the result, from the tuning on; what the teacher said is in the lessons."""
    return {
        "what": "reason",
        "child": source_sha256(folder),
        "lessons": taught.sha256,
        "held_out": [(problem.text, problem.answer) for problem in problems.held_out],
        "checker": judge.words if isinstance(judge, Checker) else None,
        "settings": request.settings.recorded(),
    }


def _rows(child: Model, teacher: Score, before: Score, after: Score) -> tuple[Row, ...]:
    return (
        Row("teacher", None, {"accuracy": teacher.accuracy}),
        Row("child before", child.parameters, {"accuracy": before.accuracy}),
        Row("child after", child.parameters, {"accuracy": after.accuracy}),
    )


def _write_beside(
    child: Model, problems: Problems, given: Collected, taught: Lessons, folder: Path, out: Path
) -> None:
    """Write what the child learned from, what it was scored on, and text to judge its exports by."""
    finishing.write_rows(taught.rows, out / TRACES)
    finishing.write_rows(given.selection.rejected_rows, out / REJECTED)
    rows = ({"problem": problem.text, "answer": problem.answer} for problem in problems.held_out)
    finishing.write_rows(rows, out / HELD_OUT)
    shown = given.held_out or [Trace(problem, problem.answer or "") for problem in problems.held_out]
    texts = [whole_text(child.tokenizer, each.problem.text, each.solution) for each in shown]
    # One document: each alone is shorter than what a figure can be told of.
    finishing.write_beside(["\n\n".join(texts)], folder, out)


def _settings(request: Request, judge: Judge) -> dict[str, Any]:
    made: dict[str, Any] = {**request.settings.recorded(), "temperature": request.temperature}
    if isinstance(judge, Checker):
        limits = vars(judge.limits)
        made["checker"] = {"command": request.checker, "network_is_off": judge.network_is_off, **limits}
    return made


def _held_out(problems: Problems, teacher: Score, before: Score, after: Score) -> dict[str, Any]:
    scores = {"teacher": teacher, "child before": before, "child after": after}
    return {
        "problems": len(problems.held_out),
        "training_problems": len(problems.training),
        "scores": {name: each.as_json() for name, each in scores.items()},
    }


def _lineage(folder: Path, teacher: dict[str, Any], request: Request) -> dict[str, Any]:
    return {
        "teacher": teacher,
        "student": {"name": folder.resolve().name, "sha256": source_sha256(folder)},
        "problems": {"name": request.problems.name, "sha256": sha256_file(request.problems)},
    }


def _notes(selection: Selection, taught: Lessons, judge: Judge) -> tuple[str, ...]:
    rejected = ", ".join(f"{count} {why}" for why, count in sorted(selection.rejected.items())) or "none"
    notes = [
        f"of {selection.asked:,} solutions {len(taught.traces):,} are learned from; rejected: {rejected}",
        f"{selection.unsolved:,} problems without a right solution" if selection.unsolved else "",
        f"{taught.too_long:,} solutions are longer than --length and were left out"
        if taught.too_long
        else "",
    ]
    if isinstance(judge, Checker) and not judge.network_is_off:
        notes.append("this system gives no namespaces: the checker ran with the network on")
    return tuple(note for note in notes if note)
