"""The process that holds one artifact and is asked for turn after turn; only to be started as a child."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from slm_export.bench.engines import Engine, open_engine
from slm_export.bench.file_cache import evict
from slm_export.bench.temperature import host_temperature
from slm_export.child import serve_all
from slm_export.memory import peak_resident_mb


class _Measured:
    """An artifact that is opened, spoken to, and in the end opened again and again."""

    def __init__(self) -> None:
        self._opening: tuple[str, Path, str, int, int]
        self._engine: Engine
        self._empty_mb = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked: open, turn, sustain, memory, load."""
        request = dict(request)
        return dict(getattr(self, f"_{request.pop('do')}")(**request))

    def _open(self, engine: str, path: str, task: str, threads: int, room: int) -> dict[str, Any]:
        self._opening = (engine, Path(path), task, threads, room)
        self._engine = open_engine(*self._opening)
        found = self._engine
        self._empty_mb = found.empty_mb
        return {"runtime": found.runtime, "context": found.context, "generates": found.generates}

    def _turn(self, prompt: int, generated: int) -> dict[str, Any]:
        prefill_s, decode_s = self._engine.turn(prompt, generated)
        return {"prefill_s": prefill_s, "decode_s": decode_s}

    def _sustain(self, prompt: int, generated: int, seconds: float) -> dict[str, Any]:
        """Repeat a turn for so long; the speed of each, with the temperature after it."""
        began = time.perf_counter()
        instants: list[tuple[float, float, float | None]] = []
        while not instants or time.perf_counter() - began < seconds:
            prefill_s, decode_s = self._engine.turn(prompt, generated)
            speed = generated / decode_s if decode_s else prompt / prefill_s
            instants.append((time.perf_counter() - began, speed, host_temperature()))
        return {"instants": instants}

    def _memory(self) -> dict[str, Any]:
        peak = peak_resident_mb()
        return {"peak_rss_mb": peak, "model_rss_mb": peak - self._empty_mb}

    def _load(self, cold: bool) -> dict[str, Any]:
        """Open again, from the disk or from the memory that the system keeps of files; milliseconds, or None."""
        self._engine.close()
        gone = evict(self._opening[1]) if cold else True
        self._engine = open_engine(*self._opening)
        return {"load_ms": 1000 * self._engine.load_s if gone else None}


if __name__ == "__main__":
    serve_all(_Measured().answer)
