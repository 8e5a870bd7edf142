"""``slm-export distil``: a student learns from a teacher, is measured beside it, and is left as a model folder.

One function from top to bottom; what is particular to decoders and to encoders is in `distil_decoder` and
`distil_encoder`, each a `Lesson`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from slm_export.bundles.bundle import Staging, staged
from slm_export.toolchain import versions
from slm_export.errors import InputError
from slm_export.evaltext import load_documents, text_sha256
from slm_export.learning import students
from slm_export.learning.distil_decoder import DecoderLesson
from slm_export.learning.distil_encoder import EncoderLesson, refuse_unlike_widths
from slm_export.learning.distil_settings import DistilSettings
from slm_export.learning.fitting import shape_within
from slm_export.learning.grid import OnGrid, put_on_grid, stored_as
from slm_export.learning.held_out import Split, split
from slm_export.learning.models import Model, load, save
from slm_export.learning.outcome import Outcome, Row, write_outcome
from slm_export.learning.places import Place, place
from slm_export.learning.processes import rank, wait_for_all, world
from slm_export.learning.shapes import shrink
from slm_export.learning.texts import Document, Texts, read_texts
from slm_export.learning.trainer import Curve, Example, Loss, Measure, Watcher, train
from slm_export.progress import Progress
from slm_export.source.hub import find_model
from slm_export.source.licences import licence_files, licence_of
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.templates import render_chat

HELD_OUT = "held_out.txt"
"""In the child's folder: text to judge exports of it on."""
_KEPT_CHARACTERS = 400_000
_NOTES = "notes.json"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    teacher: str
    data: tuple[Path, ...]
    out: Path
    student: Path | None = None
    """A model folder; None: as ``settings.shape`` or ``max_size`` says."""
    max_size: int | None = None
    """Bytes of the artifact that the student is cut to."""
    held_out: tuple[Path, ...] = ()
    data_licence: str | None = None
    settings: DistilSettings = field(default_factory=DistilSettings)
    force: bool = False


class Lesson(Protocol):
    """What is particular to a kind of model."""

    @property
    def training(self) -> Sequence[Example]:
        """What is learned from."""

    @property
    def held_out(self) -> Sequence[Example]:
        """What is only measured on."""

    def watchers(self, student: Model) -> Sequence[Watcher]:
        """Return what changes with the steps."""

    def loss(self, student: Model) -> Loss:
        """Return the loss of a student."""

    def measure(self, student: Model) -> Measure:
        """Return what is measured on the way, on few held-out examples."""

    def figures(self, model: Model) -> Mapping[str, Any]:
        """Return the figures of a model on all held-out examples: name -> `measures.Interval`."""


def distil(request: Request, progress: Progress) -> tuple[Outcome, Path] | None:
    """Teach a student, and put it in its place; nothing is left there unless all went well.

    Of several processes (torchrun) the first one writes and returns the outcome, the others return None.

    Raises:
        SlmExportError: whatever a user can cause or mend.
    """
    began = time.monotonic()
    settings = request.settings
    folder = find_model(request.teacher, None)
    with progress.stage("read teacher and text"):
        teacher = load(folder)
        students.refuse_long(teacher, settings.training.length)
        if request.student is not None:
            student = load(request.student)
            students.refuse_unlike(teacher, student)
            if teacher.task != GENERATION:
                refuse_unlike_widths(teacher, student, settings.encoder)
        texts, given, parts = _texts(request, teacher)
    key = _key(request, folder, parts)
    with _destination(request) as staging, place(key) as work:
        lesson = _lesson(teacher, settings, parts, progress)
        before = work.once("student", lambda path: _begin(request, teacher, lesson, work, path, progress))
        notes = [*parts.notes, *json.loads((work.folder / _NOTES).read_text(encoding="utf-8"))]
        student = load(before)
        with progress.stage("measure teacher and student"):
            rows = [
                Row("teacher", teacher.parameters, lesson.figures(teacher)),
                Row("child before", student.parameters, lesson.figures(student)),
            ]
        curve = _teach(lesson, student, settings, work, progress)
        if staging is None:
            wait_for_all()
            return None
        after = _saved(student, settings, staging.path)
        with progress.stage("measure the child"):
            rows.append(Row("child after", after.parameters, lesson.figures(after)))
        _write_beside(parts.held_out, folder, staging.path)
        outcome = Outcome(
            by="distil",
            model=request.out.resolve().name,
            rows=tuple(rows),
            curves={"distil": curve},
            settings=settings.recorded(),
            data=_data(texts, parts.training, lesson.training),
            held_out=_data(given, parts.held_out, lesson.held_out)
            | {"export_sha256": text_sha256(load_documents(staging.path / HELD_OUT))},
            lineage=_lineage(folder, request, before),
            licence=licence_of(folder),
            data_licence=request.data_licence,
            notes=tuple(notes),
            seconds=time.monotonic() - began,
            toolchain=versions(("torch", "transformers", "tokenizers", "accelerate", "safetensors")),
        )
        write_outcome(outcome, staging.path)
        place_of = staging.commit()
        work.done()
        wait_for_all()
        return outcome, place_of


@contextmanager
def _destination(request: Request) -> Iterator[Staging | None]:
    """Yield where the child is written; None in every process but the first."""
    if rank() != 0:
        yield None
        return
    with staged(request.out, request.force) as staging:
        yield staging


def _texts(request: Request, teacher: Model) -> tuple[Texts, Texts | None, Split]:
    """Read, check and split the text."""

    def chat(messages: Any, where: str) -> str:
        if teacher.tokenizer.chat_template is None:
            return "\n".join(str(message["content"]) for message in messages)
        return render_chat(teacher.tokenizer.backend, messages, where, answer=False)

    texts = read_texts(request.data, chat)
    given = read_texts(request.held_out, chat) if request.held_out else None
    return texts, given, split(texts, given)


def _key(request: Request, folder: Path, parts: Split) -> dict[str, Any]:
    """Return what decides the result."""
    return {
        "what": "distil",
        "teacher": source_sha256(folder),
        "student": None if request.student is None else source_sha256(request.student),
        "max_size": request.max_size,
        "text": parts.sha256,
        "settings": request.settings.recorded(),
        "processes": world(),
    }


def _lesson(teacher: Model, settings: DistilSettings, parts: Split, progress: Progress) -> Lesson:
    if teacher.task == GENERATION:
        return DecoderLesson(teacher, settings, parts, progress)
    return EncoderLesson(teacher, settings, parts)


def _begin(
    request: Request, teacher: Model, lesson: Lesson, work: Place, path: Path, progress: Progress
) -> None:
    """Write the student as it is before it learns, and beside it what there is to say of it."""
    notes: tuple[str, ...] = ()
    if request.student is not None:
        save(load(request.student), path)
    else:
        shape = request.settings.shape
        if request.max_size is not None:
            shape = shape_within(teacher, request.max_size, request.settings.grid)
        if shape is None:
            raise InputError("no student: give --student FOLDER, --shrink layers=0.5, or --max-size 3MB")
        notes = shrink(teacher, shape, lesson.training, path, progress)
        notes = (f"the student is its teacher with {shape}", *notes)
    (work.folder / _NOTES).write_text(json.dumps(notes), encoding="utf-8")


def _teach(
    lesson: Lesson, student: Model, settings: DistilSettings, work: Place, progress: Progress
) -> Curve:
    """Train the student; with a grid, what is left of it are the values that its export will hold."""
    loss, measure = lesson.loss(student), lesson.measure(student)
    watchers = list(lesson.watchers(student))
    taught, measured, grid = loss, measure, settings.grid
    if grid is not None:
        checkpoint = load_checkpoint(student.folder)
        on_grid = OnGrid(loss, student.module, checkpoint, grid, settings.training)
        watchers.append(on_grid)
        taught, measured = on_grid, lambda module: measure(on_grid.standing(module))
    curve = train(
        student.module,
        lesson.training,
        taught,
        settings.training,
        work,
        progress,
        pad_id=student.tokenizer.pad_id,
        measure=measured,
        watchers=watchers,
        name="distil",
    )
    if grid is not None:
        with progress.stage("put the child on the grid"):
            put_on_grid(student.module, stored_as(checkpoint, grid))
    return curve


def _saved(student: Model, settings: DistilSettings, out: Path) -> Model:
    """Write the child, and read it back as an export will; values of the grid are exact in float32."""
    save(student, out, None if settings.grid is None else torch.float32)
    return load(out)


def _write_beside(held_out: Sequence[Document], folder: Path, out: Path) -> None:
    """Put text to judge exports on, and the teacher's licence texts, beside the weights."""
    kept: list[str] = []
    characters = 0
    for document in held_out:
        if kept and characters + len(document.text) > _KEPT_CHARACTERS:
            break
        kept.append(document.text)
        characters += len(document.text)
    (out / HELD_OUT).write_text("\n\f\n".join(kept), encoding="utf-8", newline="\n")
    for file in licence_files(folder):
        (out / file.name).write_bytes(file.read_bytes())
    licence = licence_of(folder)
    card = f"---\nlicense: {licence}\n---\n" if licence else ""
    text = f"{card}\n# {out.name}\n\nTaught by slm-export; learning.html says how.\n"
    (out / "README.md").write_text(text.lstrip(), encoding="utf-8")


def _data(texts: Texts | None, documents: Sequence[Document], examples: Sequence[Example]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "examples": len(examples),
        "tokens": sum(len(example["input_ids"]) for example in examples),
    }
    if texts is not None:
        facts["files_read"] = texts.facts()
    return facts


def _lineage(folder: Path, request: Request, before: Path) -> dict[str, Any]:
    made: dict[str, Any] = {"teacher": {"name": folder.resolve().name, "sha256": source_sha256(folder)}}
    if request.student is not None:
        name = request.student.resolve().name
        made["student"] = {"name": name, "sha256": source_sha256(request.student)}
    else:
        made["student"] = {"cut_from": "teacher", "sha256": source_sha256(before)}
    return made
