"""A decoder's ONNX folder in onnxruntime-genai, which is what an app runs it with."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

from slm_export.bench.engines import version
from slm_export.errors import InputError, needs
from slm_export.memory import resident_mb


class GenAIEngine:
    """The generation loop of onnxruntime-genai, without stop tokens."""

    generates = True

    def __init__(self, module: Any, model: Any, context: int, load_s: float, empty_mb: float) -> None:
        self._module, self._model = module, model
        self.runtime, self.context = version("onnxruntime-genai"), context
        self.load_s, self.empty_mb = load_s, empty_mb

    def turn(self, prompt: int, generated: int) -> tuple[float, float | None]:
        """See `Engine`."""
        parameters = self._module.GeneratorParams(self._model)
        length = prompt + generated
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = self._module.Generator(self._model, parameters)
        began = time.perf_counter()
        generator.append_tokens([1] * prompt)
        generator.get_logits()
        middle = time.perf_counter()
        # The first token comes from the prompt's own logits: it is chosen, not computed.
        generator.generate_next_token()
        chosen = time.perf_counter()
        for _ in range(generated - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        steps = generated - 1
        decode = (ended - chosen) * generated / steps if steps else None
        return middle - began, decode

    def close(self) -> None:
        """See `Engine`."""
        del self._model


def open_engine(path: Path, task: str, threads: int, room: int) -> GenAIEngine:
    """Open the folder around a ``.onnx`` that has a genai_config.json."""
    with needs("onnx", "onnxruntime-genai"):
        genai = importlib.import_module("onnxruntime_genai")
    config = genai.Config(str(path.parent))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    written = json.loads((path.parent / "genai_config.json").read_text(encoding="utf-8"))
    empty_mb, began = resident_mb(), time.perf_counter()
    try:
        model = genai.Model(config)
    except Exception as error:  # the binding has no class of its own
        raise InputError(f"{path.parent}: onnxruntime-genai cannot load it: {error}") from error
    load_s = time.perf_counter() - began
    return GenAIEngine(genai, model, int(written["model"]["context_length"]), load_s, empty_mb)
