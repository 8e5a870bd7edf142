"""``.litertlm`` in LiteRT-LM, by the benchmark that is part of it: it fills prompts with tokens of its own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from slm_export.bench.engines import version
from slm_export.errors import InputError, needs
from slm_export.exporters.litert_container import Container
from slm_export.memory import resident_mb
from slm_export.tokenization.runtime_tokenizers import captured_stderr

_IN_MEMORY = ":memory"
"""LiteRT-LM's name for a cache of packed weights without a file beside the model."""


class LiteRTLMEngine:
    """Opens the file anew for every turn, as the vendor's benchmark does; loading is timed apart."""

    generates = True

    def __init__(self, path: Path, threads: int, context: int) -> None:
        with needs("litert", "litert-lm"):
            self._module = importlib.import_module("litert_lm")
        self._path, self._threads = path, threads
        self.runtime, self.context = version("litert-lm-api"), context
        self.empty_mb = resident_mb()
        self.load_s = float(self._measure(1, 1).init_time_in_second)

    def turn(self, prompt: int, generated: int) -> tuple[float, float | None]:
        """See `Engine`."""
        found = self._measure(prompt, generated)
        return (
            found.last_prefill_token_count / found.last_prefill_tokens_per_second,
            found.last_decode_token_count / found.last_decode_tokens_per_second,
        )

    def close(self) -> None:
        """Nothing stays open between turns."""

    def _measure(self, prompt: int, generated: int) -> Any:
        log: list[str] = []
        cpu = self._module.Backend.CPU(thread_count=self._threads)
        try:
            with captured_stderr(log):
                found = self._module.Benchmark(
                    model_path=str(self._path),
                    backend=cpu,
                    prefill_tokens=prompt,
                    decode_tokens=generated,
                    max_num_tokens=self.context,
                    cache_dir=_IN_MEMORY,
                ).run()
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{self._path}: LiteRT-LM cannot run it: {error}; {' '.join(log[-2:])}"
            ) from error
        if (found.last_prefill_token_count, found.last_decode_token_count) != (prompt, generated):
            raise InputError(
                f"{self._path}: LiteRT-LM read {found.last_prefill_token_count} tokens and generated "
                f"{found.last_decode_token_count} where {prompt} and {generated} were asked for"
            )
        return found


def open_engine(path: Path, task: str, threads: int, room: int) -> LiteRTLMEngine:
    """Open a file with the context that it names itself."""
    with needs("litert", "litert-lm-builder"):
        named = int(Container.read(path).metadata.max_num_tokens)
    return LiteRTLMEngine(path, threads, named or room)
