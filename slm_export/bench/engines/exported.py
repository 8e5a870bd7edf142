"""What our exporters open themselves: ``.pte`` programs, and encoders of every format."""

from __future__ import annotations

import time
from pathlib import Path

from slm_export.bench.engines import version
from slm_export.errors import InputError
from slm_export.latency import seconds_of, timed_turn
from slm_export.memory import resident_mb
from slm_export.registry import exporter
from slm_export.runtime import DecoderSession, Session
from slm_export.source.tasks import GENERATION

_FORMATS = {".pte": "executorch", ".tflite": "litert", ".onnx": "onnx"}
_PACKAGES = {"executorch": "executorch", "litert": "ai-edge-litert", "onnx": "onnxruntime"}


class SessionEngine:
    """A session of one of our exporters."""

    def __init__(self, session: Session, runtime: str, load_s: float, empty_mb: float) -> None:
        self._session = session
        self.runtime, self.load_s, self.empty_mb = runtime, load_s, empty_mb
        self.context = session.context
        self.generates = isinstance(session, DecoderSession)

    def turn(self, prompt: int, generated: int) -> tuple[float, float | None]:
        """See `Engine`."""
        if isinstance(self._session, DecoderSession):
            return timed_turn(self._session, prompt, generated)
        ids, mask, session = [1] * prompt, [1] * prompt, self._session
        return seconds_of(lambda: session.outputs(ids, mask)), None

    def close(self) -> None:
        """See `Engine`."""
        self._session.close()


def open_engine(path: Path, task: str, threads: int, room: int) -> SessionEngine:
    """Open an artifact through the exporter of its format.

    A program of ExecuTorch's own exporter has the same entry point and the same constant methods as ours.
    """
    format = _FORMATS[path.suffix]
    runtime = exporter(format)
    runtime.set_threads(threads)
    empty_mb, began = resident_mb(), time.perf_counter()
    try:
        session = runtime.open(path, task)
    except KeyError as error:
        raise InputError(
            f"{path}: says nothing of {error}, which a runner of language models asks for; "
            f"it cannot be measured as {'a decoder' if task == GENERATION else 'an encoder'}"
        ) from error
    return SessionEngine(session, version(_PACKAGES[format]), time.perf_counter() - began, empty_mb)
