"""A ``.tflite`` or ``.litertlm`` open in LiteRT's own runtime."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.adapter_matrices import NO_PLACES, A, B, Places, read_adapter
from slm_export.exporters.litert_container import Container
from slm_export.exporters.litert_dialect import MASKED
from slm_export.foreign import reading
from slm_export.runtime import Session
from slm_export.source.tasks import GENERATION

DECODE, PREFILL, ENCODE = "decode", "prefill_", "encode_"
METADATA = "slm-export"
"""Name of the entry in an encoder's file that tells what the runtime does not."""

ADAPTED = "adapted_"
"""Before the names of functions with places for an adapter: LiteRT-LM would take ``prefill_...`` for one of its own."""
_IN_MEMORY = ":memory"
"""XNNPACK's name for a cache of packed weights without a file: functions share it instead of packing anew."""


def open_session(path: Path, task: str, threads: int) -> Session:
    """Open a file; InputError where it is not one, or not one of ours."""
    with reading(path, "LiteRT cannot load it"):
        if task != GENERATION:
            return _Encoder(_load(path, threads), path)
        container = Container.read(path)
        with container.extracted() as model:
            return _Decoder(_load(model, threads), container, threads)


def places_of(path: Path) -> Places:
    """Return what a decoder has places for; none where it was written without."""
    session = open_session(path, GENERATION, 1)
    assert isinstance(session, _Decoder)
    try:
        return session.kept
    finally:
        session.close()


def _load(path: Path, threads: int) -> Any:
    compiled = importlib.import_module("ai_edge_litert.compiled_model")
    options = importlib.import_module("ai_edge_litert.options")
    hardware = importlib.import_module("ai_edge_litert.hardware_accelerator")
    cpu = options.CpuOptions(num_threads=threads, xnnpack_weight_cache_path=_IN_MEMORY)
    try:
        return compiled.CompiledModel.from_file(
            str(path),
            options=options.Options(hardware_accelerators=hardware.HardwareAccelerator.CPU, cpu_options=cpu),
        )
    except RuntimeError as error:
        raise InputError(f"{path}: LiteRT cannot load it: {error}; export the model again") from error


class _Decoder:
    def __init__(self, model: Any, container: Container, threads: int) -> None:
        self._model, self._threads = model, threads
        self._signatures: Mapping[str, Any] = model.get_signature_list()
        self.kept = self._find_places()
        self.places = frozenset(self.kept.shapes)
        self._prefix = ""
        self._matrices: dict[str, Any] = {}
        self._container = container
        self.stop_ids, self.bos_id = container.stop_ids, container.bos_id
        self.vocabulary: int | None = None
        details = model.get_input_tensor_details(DECODE)
        self.context = int(details["mask"]["shape"][-1])
        lengths = [int(name.removeprefix(PREFILL)) for name in self._signatures if name.startswith(PREFILL)]
        self._lengths = sorted(lengths, reverse=True)
        self.prefill_chunk = self._lengths[0] if lengths else 1
        # In and out: the runtime writes where it has read.
        self._caches = {
            name: model.create_input_buffer_by_name(DECODE, name)
            for name in self._signatures[DECODE]["inputs"]
            if name.startswith("kv_cache_")
        }
        for name, buffer in self._caches.items():
            buffer.write(np.zeros(details[name]["shape"], dtype=np.float32))
        self._logits = model.create_output_buffer_by_name(DECODE, "logits")
        self._vocabulary = int(model.get_output_tensor_details(DECODE)["logits"]["shape"][-1])
        self._inputs: dict[str, dict[str, Any]] = {}

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        """Feed tokens at position ``start``; return float32 (vocabulary,) after the last of them."""
        if not tokens or start + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens at {start} do not fit a context of {self.context}")
        at, last = 0, len(tokens) - 1
        while at < last:
            at += self._prefill(tokens[at:last], start + at)
        self._run(DECODE, tokens[last:], start + last)
        return torch.from_numpy(self._logits.read(self._vocabulary, np.float32))

    def adapt(self, adapter: Path | None) -> None:
        """Turn an adapter file on, or with None whichever is on off; the model stays loaded.

        What the cache holds was read with the adapter of that time: begin again at position 0.

        Raises:
            InputError: it is no adapter file, or not one for this model.
        """
        if adapter is None:
            self._prefix = ""
            return
        given = read_adapter(adapter, self._container.path, self.kept)
        for name, matrix in zip(self.kept.inputs, given, strict=True):
            if name not in self._matrices:
                self._matrices[name] = self._model.create_input_buffer_by_name(ADAPTED + DECODE, name)
            self._matrices[name].write(matrix.numpy())
        self._prefix = ADAPTED

    def adapted(self, adapter: Path, tokens: Sequence[int]) -> Tensor:
        """Return the logits after some tokens, of the model loaded anew."""
        session = open_session(self._container.path, GENERATION, self._threads)
        assert isinstance(session, _Decoder)
        try:
            session.adapt(adapter)
            return session.logits(tokens, 0)
        finally:
            session.close()

    def _find_places(self) -> Places:
        function = ADAPTED + DECODE
        if function not in self._signatures:
            return NO_PLACES
        details = self._model.get_input_tensor_details(function)
        shapes = {
            f"{name.removesuffix(A)}.weight": (
                int(details[name.removesuffix(A) + B]["shape"][-1]),
                int(found["shape"][1]),
            )
            for name, found in details.items()
            if name.endswith(A)
        }
        (rank,) = {int(found["shape"][-1]) for name, found in details.items() if name.endswith(A)}
        return Places(rank, shapes)

    def metadata(self) -> Mapping[str, Any]:
        """Return LiteRT-LM's own metadata, and the functions of the file."""
        metadata = self._container.metadata
        return {
            "max_num_tokens": metadata.max_num_tokens,
            "start_token": list(metadata.start_token.token_ids.ids),
            "stop_tokens": list(self.stop_ids),
            "signatures": sorted(self._signatures),
        }

    def close(self) -> None:
        """Let go of the file and of its memory; the runtime says good-bye in the log, so it is done here."""
        self._caches.clear()
        self._inputs.clear()
        self._matrices.clear()
        self._model.close()
        del self._logits, self._model

    def _prefill(self, tokens: Sequence[int], start: int) -> int:
        """Feed some tokens by the function that fits them best; return how many."""
        room = self.context - start
        # What a function writes beyond its tokens is overwritten later, but must not leave the cache.
        usable = [length for length in self._lengths if length <= room]
        fitting = [length for length in usable if length >= len(tokens)]
        if not usable or (len(tokens) == 1 and not fitting):
            self._run(DECODE, tokens[:1], start)
            return 1
        length = min(fitting) if fitting else max(usable)
        count = min(length, len(tokens))
        self._run(f"{PREFILL}{length}", tokens[:count], start)
        return count

    def _run(self, function: str, tokens: Sequence[int], start: int) -> None:
        name = self._prefix + function
        wanted = self._signatures[name]["inputs"]
        if name not in self._inputs:
            self._inputs[name] = {
                each: self._model.create_input_buffer_by_name(name, each)
                for each in wanted
                if each not in self._caches and each not in self._matrices
            }
        length = 1 if function == DECODE else int(function.removeprefix(PREFILL))
        positions = np.arange(start, start + length, dtype=np.int32)
        values = {
            "tokens": np.array([[*tokens, *[0] * (length - len(tokens))]], dtype=np.int32),
            "input_pos": positions,
            "mask": np.where(
                np.arange(self.context) <= positions[:, None], np.float32(0), np.float32(MASKED)
            ),
        }
        inputs = self._inputs[name]
        for each, buffer in inputs.items():
            buffer.write(values[each])
        matrices = {each: self._matrices[each] for each in wanted if each in self._matrices}
        outputs = {**self._caches, **({"logits": self._logits} if function == DECODE else {})}
        self._model.run_by_name(name, {**inputs, **matrices, **self._caches}, outputs)


class _Encoder:
    def __init__(self, model: Any, path: Path) -> None:
        self._model = model
        self._signatures: Mapping[str, Any] = model.get_signature_list()
        lengths = [int(name.removeprefix(ENCODE)) for name in self._signatures if name.startswith(ENCODE)]
        if not lengths:
            raise InputError(f"{path}: has no function '{ENCODE}...'; export the model again")
        self._lengths = sorted(lengths)
        self.context = self._lengths[-1]

    def outputs(self, tokens: Sequence[int], mask: Sequence[int], types: Sequence[int] = ()) -> Tensor:
        """Return float32: an embedding (width,), or scores of the shape of the task, without batch."""
        if not tokens or len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens do not fit a longest input of {self.context}")
        length = next(length for length in self._lengths if length >= len(tokens))
        function = f"{ENCODE}{length}"
        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types or [0] * len(tokens)}
        inputs = {}
        for name in self._signatures[function]["inputs"]:
            inputs[name] = self._model.create_input_buffer_by_name(function, name)
            values = given[name]
            inputs[name].write(np.array([[*values, *[0] * (length - len(values))]], dtype=np.int32))
        ((output, details),) = self._model.get_output_tensor_details(function).items()
        result = self._model.create_output_buffer_by_name(function, output)
        self._model.run_by_name(function, inputs, {output: result})
        shape = [int(size) for size in details["shape"]]
        return torch.from_numpy(result.read(int(np.prod(shape)), np.float32)).view(shape)[0]

    def metadata(self) -> Mapping[str, Any]:
        """Return the functions of the file."""
        return {"signatures": sorted(self._signatures)}

    def close(self) -> None:
        """Let go of the file and of its memory."""
        self._model.close()
        del self._model
