"""What a fault is, and the ways in which one can be put into an export.

A fault is a mistake that some exporter, pass, runtime or user has made or could make. It is put where it would arise:
the artifact is written from a model that differs from what the gate is told, or from one that a pass has spoilt; the
tokenizer's files are spoilt before they are packed; or the open artifact forgets what it should keep.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from slm_export.checkpoint import Checkpoint
from slm_export.runtime import DecoderSession, ExportOptions, Session

FORMATS = ("executorch", "litert", "onnx", "coreml")


def _same_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


def _same_options(options: ExportOptions) -> ExportOptions:
    return options


def _same_session(session: Session) -> Session:
    return session


def _same_files(folder: Path) -> None:
    """Leave them."""


@dataclass(frozen=True)
class Fault:
    """One mistake, and where it is made."""

    name: str
    kind: str
    model: str = "llama"
    """Which of `models.MODELS` it is planted in."""
    bits: int = 8
    formats: tuple[str, ...] = FORMATS
    written: Callable[[Checkpoint], Checkpoint] = _same_checkpoint
    """By the exporter: what it writes is not the quantized checkpoint that the gate knows."""
    made: Callable[[Checkpoint], Checkpoint] = _same_checkpoint
    """By a pass: the quantized checkpoint itself is wrong, and the gate is told that it is right."""
    writing: Callable[[], AbstractContextManager[object]] = nullcontext
    """In the code that builds the graph, for as long as the artifact is written."""
    options: Callable[[ExportOptions], ExportOptions] = _same_options
    tokenizer: Callable[[Path], None] = _same_files
    """In the bundle's tokenizer files, before they are packed."""
    file: Callable[[Path], None] = _same_files
    """In the artifact, once it is written."""
    session: Callable[[DecoderSession], Session] = _same_session
    """In the runtime."""
