"""Reads a prompt with an artifact and writes down the logits after it; needs the runtimes' own wheels alone.

    python arm_child.py FORMAT ARTIFACT OUT.npy TOKEN...

It runs on this machine and in an emulated Arm process alike. Half of the prompt is read at once, the rest token by
token, so that the kernels of both are used. Result: float32 (tokens read one by one, vocabulary).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Logits = np.ndarray[Any, Any]


def executorch(path: Path, parts: Sequence[Sequence[int]]) -> list[Logits]:
    """The program takes tokens and where they stand."""
    import torch

    runtime = importlib.import_module("executorch.extension.pybindings._portable_lib")
    (package,) = importlib.import_module("executorch").__path__
    for library in (
        "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
        "kernels/quantized/libquantized_ops_aot_lib.so",
    ):
        torch.ops.load_library(str(Path(package) / library))  # type: ignore[no-untyped-call]
    method = runtime._load_program(str(path)).load_method("forward")
    found, at = [], 0
    for part in parts:
        found.append(method([torch.tensor([part]), torch.tensor([at])])[0][0].clone().numpy())
        at += len(part)
    return found


def litert(path: Path, parts: Sequence[Sequence[int]]) -> list[Logits]:
    """The functions prefill_16 and decode, over caches that go in and come out."""
    compiled = importlib.import_module("ai_edge_litert.compiled_model")
    model = compiled.CompiledModel.from_file(str(path))
    details = model.get_input_tensor_details("decode")
    context = int(details["mask"]["shape"][-1])
    caches = {}
    for name in details:
        if name.startswith("kv_cache_"):
            caches[name] = model.create_input_buffer_by_name("decode", name)
            caches[name].write(np.zeros(details[name]["shape"], dtype=np.float32))
    logits = model.create_output_buffer_by_name("decode", "logits")
    size = int(model.get_output_tensor_details("decode")["logits"]["shape"][-1])
    found, at = [], 0
    for part in parts:
        prefill = len(part) > 1
        function, length = ("prefill_16", 16) if prefill else ("decode", 1)
        positions = np.arange(at, at + length, dtype=np.int32)
        values = {
            "tokens": np.array([[*part, *[0] * (length - len(part))]], dtype=np.int32),
            "input_pos": positions,
            "mask": np.where(np.arange(context) <= positions[:, None], np.float32(0), np.float32(-1e9)),
        }
        inputs = {}
        for name, value in values.items():
            inputs[name] = model.create_input_buffer_by_name(function, name)
            inputs[name].write(value)
        outputs = caches if prefill else {**caches, "logits": logits}
        model.run_by_name(function, {**inputs, **caches}, outputs)
        found += [] if prefill else [logits.read(size, np.float32)]
        at += len(part)
    return found


def onnx(path: Path, parts: Sequence[Sequence[int]]) -> list[Logits]:
    """Past and present of every layer are one buffer of the whole context."""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    context = int(session.get_modelmeta().custom_metadata_map["slm_export.context"])
    binding, kept = session.io_binding(), []

    def bind(name: str, array: Logits, *, out: bool = False) -> None:
        kept.append(array)
        put = binding.bind_output if out else binding.bind_input
        put(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    for value in session.get_inputs()[2:]:
        cache = np.zeros((1, value.shape[1], context, value.shape[3]), dtype=np.float32)
        bind(value.name, cache)
        bind(value.name.replace("past_key_values", "present"), cache, out=True)
    logits = np.empty(session.get_outputs()[0].shape, dtype=np.float32)
    bind("logits", logits, out=True)
    found, at = [], 0
    for part in parts:
        at += len(part)
        bind("input_ids", np.array([part], dtype=np.int64))
        bind("attention_mask", np.ones((1, at), dtype=np.int64))
        session.run_with_iobinding(binding)
        found.append(logits.reshape(-1).copy())
    return found


def main() -> None:
    """Read, and write down."""
    format, artifact, out, *tokens = sys.argv[1:]
    ids = [int(token) for token in tokens]
    half = len(ids) // 2
    parts = [ids[:half], *([token] for token in ids[half:])]
    found = {"executorch": executorch, "litert": litert, "onnx": onnx}[format](Path(artifact), parts)
    np.save(out, np.stack(found[-len(ids[half:]) :]))


if __name__ == "__main__":
    main()
