"""``slm-export adapt``: a model learns a domain from plain text, or a task from labelled examples.

One function from top to bottom; what is particular to a kind of model or task is an `objectives.Objective`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_export.bundles.bundle import staged
from slm_export.toolchain import versions
from slm_export.errors import InputError
from slm_export.learning import finishing, heads
from slm_export.learning.adapt_settings import AdaptSettings
from slm_export.learning.chats import text_of_messages, whole_text
from slm_export.learning.examples import Labelled, read_labelled
from slm_export.learning.held_out import Split, split
from slm_export.learning.measures import Interval
from slm_export.learning.models import Model, load, save
from slm_export.learning.objectives import Objective
from slm_export.learning.outcome import Outcome, Row, write_outcome
from slm_export.learning.places import Place, place
from slm_export.learning.processes import world
from slm_export.learning.self_supervised import Causal, Masked
from slm_export.learning.supervised import Classify, Embed, Generate, Tag
from slm_export.learning.texts import Texts, read_texts
from slm_export.learning.trainer import Curve
from slm_export.learning.updating import refuse_adapters_on_a_grid, settle, update
from slm_export.progress import Progress
from slm_export.source.hub import find_model
from slm_export.source.licences import licence_of
from slm_export.source.provenance import source_sha256
from slm_export.source.tasks import GENERATION


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    model: str
    out: Path
    data: tuple[Path, ...] = ()
    """Plain text, where no task is given."""
    labels: tuple[Path, ...] = ()
    """Labelled examples, where one is."""
    held_out: tuple[Path, ...] = ()
    data_licence: str | None = None
    settings: AdaptSettings = field(default_factory=AdaptSettings)
    force: bool = False


@dataclass(frozen=True)
class Matter:
    """What is learned from and measured on: plain text, or labelled examples."""

    parts: Split | Labelled
    facts: dict[str, Any]
    held_out_facts: dict[str, Any]
    documents: tuple[str, ...]
    """Held-out text to judge exports on."""
    notes: tuple[str, ...] = ()


def adapt(request: Request, progress: Progress) -> tuple[Outcome, Path]:
    """Teach a model, and put it in its place; nothing is left there unless all went well.

    Raises:
        SlmExportError: whatever a user can cause or mend.
    """
    began = time.monotonic()
    settings = request.settings
    _refuse_mixtures(request)
    refuse_adapters_on_a_grid(settings.low_rank, settings.grid)
    folder = find_model(request.model, None)
    with progress.stage("read model and data"):
        model = load(folder)
        _refuse_long(model, settings.training.length)
        matter = _matter(request, model)
        objective = _objective(model, matter, settings)
    with staged(request.out, request.force) as staging, place(_key(request, folder, matter)) as work:
        size = model.parameters
        before = _measured_once(work, "before", objective, objective.start, progress)
        curve = _teach(objective, settings, work, progress)
        made = objective.result(objective.start)
        save(made, staging.path, settle(made, settings.grid, work))
        heads.tidy(made, staging.path)
        # As it was written, in its own type; where the head was taken off, as it was with it.
        written = load(staging.path)
        final = written if written.task == objective.start.task else objective.start
        after = _measured_once(work, "after", objective, final, progress)
        finishing.write_beside(matter.documents, folder, staging.path)
        outcome = Outcome(
            by="adapt",
            model=request.out.resolve().name,
            rows=(Row("child before", size, before), Row("child after", made.parameters, after)),
            curves={"adapt": curve},
            settings=settings.recorded(),
            data={**matter.facts, "examples": len(objective.training)},
            held_out={
                **matter.held_out_facts,
                "examples": len(objective.held_out),
                **finishing.text_for_exports(staging.path),
            },
            lineage={"student": {"name": folder.resolve().name, "sha256": source_sha256(folder)}},
            licence=licence_of(folder),
            data_licence=request.data_licence,
            notes=(*matter.notes, *objective.notes),
            seconds=time.monotonic() - began,
            toolchain=versions(finishing.TOOLS),
        )
        write_outcome(outcome, staging.path)
        out = staging.commit()
        work.done()
    return outcome, out


def _refuse_mixtures(request: Request) -> None:
    if request.settings.task is None:
        if request.labels:
            raise InputError("--labels are for a --task: classify, tag, embed or generate")
        if not request.data:
            raise InputError("nothing to learn from: give text with --data, or a --task with --labels")
    elif request.data or not request.labels:
        raise InputError(
            f"--task {request.settings.task} learns from --labels FILE.jsonl, and from no --data"
        )
    if world() > 1:
        raise InputError(
            "adapt trains in one process, on a GPU where there is one; start it without torchrun"
        )


def _refuse_long(model: Model, length: int) -> None:
    if model.positions is not None and length > model.positions:
        raise InputError(
            f"--length {length} is longer than the {model.positions} positions of {model.folder.name}"
        )


def _matter(request: Request, model: Model) -> Matter:
    """Read, check and part what is learned from."""
    task = request.settings.task
    if task is None:
        return _text_matter(request, model)
    rows = read_labelled(task, request.labels, request.held_out)
    if task == "generate":
        texts = [
            whole_text(model.tokenizer, row.given, row.wanted[0], plain="{problem}") for row in rows.held_out
        ]
    else:
        texts = [row.given for row in rows.held_out]
    facts = {"labelled": len(rows.training), "duplicates": rows.duplicates, "sha256": rows.sha256}
    if task in ("classify", "tag"):
        facts["labels"] = rows.labels
    # Encoders are judged by paragraphs, and single examples are too short to judge decoders by.
    return Matter(rows, facts, {"labelled": len(rows.held_out)}, ("\n\n".join(texts),))


def _text_matter(request: Request, model: Model) -> Matter:
    chat = text_of_messages(model.tokenizer)
    texts = read_texts(request.data, chat)
    given: Texts | None = read_texts(request.held_out, chat) if request.held_out else None
    parts = split(texts, given)
    held_out = {"documents": len(parts.held_out), **({} if given is None else {"files_read": given.facts()})}
    documents = tuple(document.text for document in parts.held_out)
    return Matter(parts, {"files_read": texts.facts()}, held_out, documents, parts.notes)


def _objective(model: Model, matter: Matter, settings: AdaptSettings) -> Objective:
    length, seed, parts = settings.training.length, settings.training.seed, matter.parts
    if isinstance(parts, Split):
        if model.task == GENERATION:
            return Causal(model, parts, length)
        return Masked(model, parts, length, settings.masked, seed)
    if settings.task == "classify":
        return Classify(model, parts, length, seed)
    if settings.task == "tag":
        return Tag(model, parts, length, seed)
    if settings.task == "embed":
        return Embed(model, parts, length, seed)
    return Generate(model, parts, length)


def _teach(objective: Objective, settings: AdaptSettings, work: Place, progress: Progress) -> Curve:
    return update(
        objective.start,
        objective.training,
        objective.loss,
        settings.training,
        work,
        progress,
        "adapt",
        rank=settings.low_rank,
        grid=settings.grid,
        whole=objective.whole,
    )


def _measured_once(
    work: Place, name: str, objective: Objective, model: Model, progress: Progress
) -> dict[str, Interval]:
    """Measure on held-out examples, unless a run that was killed has done so."""
    kept = work.folder / f"{name}.json"
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        return {key: Interval(**figure) for key, figure in found.items()}
    with progress.stage(f"measure {name}"):
        model.module.eval()
        figures = dict(objective.figures(model))
    part = kept.with_suffix(".part")
    part.write_text(json.dumps({key: vars(figure) for key, figure in figures.items()}), encoding="utf-8")
    part.replace(kept)
    return figures


def _key(request: Request, folder: Path, matter: Matter) -> dict[str, Any]:
    """Return what decides the result."""
    return {
        "what": "adapt",
        "model": source_sha256(folder),
        "data": matter.parts.sha256,
        "settings": request.settings.recorded(),
    }
