"""``.gguf`` in llama.cpp, through its Python binding."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from slm_export.bench.engines import version
from slm_export.errors import InputError, MissingComponentError
from slm_export.memory import resident_mb

_BATCH = 512


class LlamaCppEngine:
    """A model in llama.cpp; its context is as large as is needed here, not as the file allows."""

    generates = True

    def __init__(self, model: Any, load_s: float, empty_mb: float) -> None:
        self._model = model
        self.runtime, self.context = version("llama-cpp-python"), int(model.n_ctx())
        self.load_s, self.empty_mb = load_s, empty_mb

    def turn(self, prompt: int, generated: int) -> tuple[float, float | None]:
        """See `Engine`."""
        self._model.reset()
        began = time.perf_counter()
        self._model.eval([1] * prompt)
        middle = time.perf_counter()
        for _ in range(generated):
            self._model.eval([1])
        return middle - began, time.perf_counter() - middle

    def close(self) -> None:
        """See `Engine`."""
        self._model.close()


def open_engine(path: Path, task: str, threads: int, room: int) -> LlamaCppEngine:
    """Open a file; MissingComponentError without llama-cpp-python."""
    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise MissingComponentError(
            f"{path}: needs llama-cpp-python, which cannot be imported ({error}); pip install llama-cpp-python"
        ) from error
    empty_mb, began = resident_mb(), time.perf_counter()
    try:
        model = llama_cpp.Llama(
            str(path), n_ctx=room, n_batch=_BATCH, n_threads=threads, n_threads_batch=threads, verbose=False
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: llama.cpp cannot load it: {error}") from error
    return LlamaCppEngine(model, time.perf_counter() - began, empty_mb)
