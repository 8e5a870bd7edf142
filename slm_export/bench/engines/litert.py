"""Any ``.tflite`` in LiteRT's CompiledModel: every function is a length, and inputs are ones."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from slm_export.bench.engines import version
from slm_export.errors import InputError, needs
from slm_export.memory import resident_mb

_TYPES = ("int32", "int64", "float32", "int8", "uint8", "bool")


class TfliteEngine:
    """A file of any exporter whose functions take tensors of fixed shapes."""

    generates = False

    def __init__(self, path: Path, model: Any, load_s: float, empty_mb: float) -> None:
        self.runtime, self.load_s, self.empty_mb = version("ai-edge-litert"), load_s, empty_mb
        self._path, self._model = path, model
        self._functions = {self._length(name): name for name in model.get_signature_list()}
        if not self._functions:
            raise InputError(f"{path}: has no function (signature) to call")
        self.context = max(self._functions)
        self._prepared: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def turn(self, prompt: int, generated: int) -> tuple[float, float | None]:
        """See `Engine`; the shortest function that the prompt fits is called."""
        function = self._functions[min(length for length in self._functions if length >= prompt)]
        if function not in self._prepared:
            self._prepared[function] = self._buffers(function)
        inputs, outputs = self._prepared[function]
        began = time.perf_counter()
        self._model.run_by_name(function, inputs, outputs)
        for name, buffer in outputs.items():
            # A result counts as there once it can be read.
            buffer.read(self._size("output", function, name), np.float32)
        return time.perf_counter() - began, None

    def close(self) -> None:
        """See `Engine`."""
        self._prepared.clear()
        self._model.close()

    def _length(self, function: str) -> int:
        shapes = [details["shape"] for details in self._details("input", function).values()]
        return max((int(shape[-1]) for shape in shapes if len(shape)), default=1)

    def _details(self, side: str, function: str) -> dict[str, Any]:
        return dict(getattr(self._model, f"get_{side}_tensor_details")(function))

    def _size(self, side: str, function: str, name: str) -> int:
        return int(np.prod([int(n) for n in self._details(side, function)[name]["shape"]]))

    def _buffers(self, function: str) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs = {}
        for name, details in self._details("input", function).items():
            kind = np.dtype(details["dtype"]).name
            if kind not in _TYPES:
                raise InputError(
                    f"{self._path}: input {name!r} of {function!r} is {kind}, which is not filled here"
                )
            inputs[name] = self._model.create_input_buffer_by_name(function, name)
            inputs[name].write(np.ones([int(n) for n in details["shape"]], dtype=kind))
        outputs = {
            name: self._model.create_output_buffer_by_name(function, name)
            for name in self._details("output", function)
        }
        return inputs, outputs


def open_engine(path: Path, task: str, threads: int, room: int) -> TfliteEngine:
    """Open a file; InputError where LiteRT cannot load it."""
    with needs("litert", "ai-edge-litert"):
        compiled = importlib.import_module("ai_edge_litert.compiled_model")
        options = importlib.import_module("ai_edge_litert.options")
        hardware = importlib.import_module("ai_edge_litert.hardware_accelerator")
    made = options.Options(
        hardware_accelerators=hardware.HardwareAccelerator.CPU,
        cpu_options=options.CpuOptions(num_threads=threads),
    )
    empty_mb, began = resident_mb(), time.perf_counter()
    try:
        model = compiled.CompiledModel.from_file(str(path), options=made)
    except RuntimeError as error:
        raise InputError(f"{path}: LiteRT cannot load it: {error}") from error
    return TfliteEngine(path, model, time.perf_counter() - began, empty_mb)
