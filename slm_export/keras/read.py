"""A TensorFlow model read whole: opened, converted, its task told, and what lies beside it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path

from slm_export.bundles.checksums import FileEntry, sha256_entries, sha256_file
from slm_export.bundles.lock import Source
from slm_export.errors import InputError, MissingComponentError
from slm_export.exporters.litert_keras import Converted, convert
from slm_export.keras.inputs import HeldOut, held_out
from slm_export.keras.judge import source_outputs, task_of, threshold_of
from slm_export.keras.source import TensorFlowModel, open_model, tensorflow
from slm_export.progress import Progress
from slm_export.source.licences import licences_sha256
from slm_export.source.load import check_values
from slm_export.source.tasks import CLASSIFICATION
from slm_export.tokenization.tokenizer import SourceTokenizer

_SAMPLE = 16
"""Inputs by which the task is told."""


@dataclass(frozen=True)
class Read:
    """A model with everything found out that does not need its artifact."""

    model: TensorFlowModel
    converted: Converted
    tokenizer: SourceTokenizer | None
    held: HeldOut
    labels: tuple[str, ...]
    threshold: float
    notes: tuple[str, ...]


def ready() -> None:
    """Raise MissingComponentError unless TensorFlow and LiteRT can be imported."""
    tensorflow()
    try:
        importlib.import_module("ai_edge_litert.compiled_model")
    except ImportError as error:
        raise MissingComponentError(
            f"a TensorFlow model is written for LiteRT, which cannot be imported ({error}); "
            "pip install 'slm-export[tensorflow]'"
        ) from error


def read_model(path: Path, context: int | None, eval_text: Path | None, progress: Progress) -> Read:
    """Open and convert a model, and find out what it is for."""
    with progress.stage("read the model"):
        model = open_model(path)
        tokenizer = _tokenizer(path)
        tokens = _tokens(model, context)
    with progress.stage("convert the graph"):
        converted = convert(model, tokens, CLASSIFICATION)
    if tokenizer is not None and tokenizer.vocab_size > converted.rows:
        raise InputError(
            f"{path}: the tokenizer beside it has {tokenizer.vocab_size} tokens, but the model's table only "
            f"{converted.rows} rows; put the model's own tokenizer there, or none"
        )
    with progress.stage("check every weight", total=len(converted.checkpoint.weights)) as stage:
        check_values(converted.checkpoint, stage.advance)
    held = held_out(eval_text, tokenizer, converted.rows, tokens)
    sample = source_outputs(model, held.inputs[:: max(1, len(held.inputs) // _SAMPLE)], tokens, padded=False)
    task, why = task_of(model, sample)
    labels = _labels(path, model.width) if task == CLASSIFICATION else ()
    notes = [f"taken for a model for {task}: {why}"]
    notes += [
        f"{name}: not stored as it is: {reason}" for name, reason in converted.checkpoint.unused.items()
    ]
    converted = replace(converted, checkpoint=replace(converted.checkpoint, task=task))
    return Read(model, converted, tokenizer, held, labels, threshold_of(sample), (*notes, *held.notes))


def source_of(path: Path, sha256: str | None = None) -> Source:
    """Return what a lock says of a model; ``sha256`` is that of `source_sha256`, where it is known already."""
    return Source(sha256=sha256 or source_sha256(path), licences=licences_sha256(path))


def source_sha256(path: Path) -> str:
    """Return the hash of a model: of its file, or of the names and contents of all files of its folder."""
    if path.is_file():
        return sha256_file(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return sha256_entries(
        FileEntry(path=file.relative_to(path).as_posix(), bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in files
    )


def _tokens(model: TensorFlowModel, context: int | None) -> int:
    if model.tokens is None and context is None:
        raise InputError(
            f"{model.path}: takes inputs of any length, but an artifact has one; say which with --context N"
        )
    if None not in (model.tokens, context) and model.tokens != context:
        raise InputError(
            f"{model.path}: takes inputs of {model.tokens} tokens, not of {context}; leave --context out"
        )
    return int(model.tokens or context or 0)


def _beside(path: Path, name: str) -> Path:
    """Return where a companion of a model lies: inside its folder, or beside its file."""
    return (path if path.is_dir() else path.parent) / name


def _tokenizer(path: Path) -> SourceTokenizer | None:
    folder = _beside(path, "tokenizer")
    return SourceTokenizer.load(folder) if folder.is_dir() else None


def _labels(path: Path, width: int) -> tuple[str, ...]:
    """Return the names of classes in ``labels.txt`` beside the model, one on a line; none without that file."""
    file = _beside(path, "labels.txt")
    if not file.is_file():
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    labels = tuple(line.strip() for line in lines if line.strip())
    classes = 2 if width == 1 else width
    if len(labels) != classes or len(set(labels)) != classes:
        raise InputError(
            f"{file}: {len(labels)} labels, but the model has {classes} classes; give each a name of its own"
        )
    return labels
