"""A ``.onnx`` open in plain ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.onnx_genai import Told, told
from slm_export.exporters.onnx_places import A, read_adapter
from slm_export.runtime import Session
from slm_export.source.tasks import GENERATION

_PREFILL = 512
"""Tokens of a prompt that are read at once: a bound on memory."""
_TASK, _CONTEXT, _LEAST = "slm_export.task", "slm_export.context", "slm_export.least"


def open_session(path: Path, task: str, threads: int = 0) -> Session:
    """Open a model; InputError where it is not one, or not one of ours. ``threads``: 0 for one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what it throws says enough
    if path.exists() and not path.is_file():  # a pipe would block
        raise InputError(f"{path}: not a regular file; export the model again")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding has a class for every status, and no common one
        raise InputError(f"{path}: ONNX Runtime cannot load it: {error}; export the model again") from error
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    if metadata.get(_TASK) != task:
        raise InputError(f"{path}: holds {metadata.get(_TASK, 'no model of ours')}, not {task}")
    if task == GENERATION:
        return _Decoder(session, metadata, told(path), path)
    return _Encoder(session, metadata)


class _Model:
    def __init__(self, session: Any, metadata: Mapping[str, str]) -> None:
        self._session = session
        self._metadata = metadata
        self.context = int(metadata[_CONTEXT])

    def metadata(self) -> Mapping[str, Any]:
        """Return what the file says of itself, and its inputs and outputs."""
        ends = {
            kind: {value.name: [value.type, *value.shape] for value in values}
            for kind, values in (
                ("inputs", self._session.get_inputs()),
                ("outputs", self._session.get_outputs()),
            )
        }
        return {**self._metadata, **ends}

    def close(self) -> None:
        """Let go of the model."""
        del self._session


class _Decoder(_Model):
    def __init__(self, session: Any, metadata: Mapping[str, str], said: Told, path: Path) -> None:
        super().__init__(session, metadata)
        self._path = path
        self._places = {
            value.name: tuple(size for size in value.shape if isinstance(size, int))
            for value in session.get_overridable_initializers()
        }
        self.places = frozenset(f"{name.removesuffix(A)}.weight" for name in self._places if name.endswith(A))
        self.stop_ids, self.bos_id, self.vocabulary = said.stop_ids, said.bos_id, said.vocabulary
        self.prefill_chunk = min(_PREFILL, self.context)
        self._mask = np.ones((1, self.context), dtype=np.int64)
        self._logits = np.empty(session.get_outputs()[0].shape, dtype=np.float32)
        self._binding = session.io_binding()
        self._caches = self._bind_caches(session)
        self._adapter: Mapping[str, Any] = {}
        self._bind("logits", self._logits, out=True)

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        """Feed tokens at position ``start``; return float32 (vocabulary,) after the last of them."""
        if not tokens or start + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens at {start} do not fit a context of {self.context}")
        for at in range(0, len(tokens), self.prefill_chunk):
            part = np.array([tokens[at : at + self.prefill_chunk]], dtype=np.int64)
            self._bind("input_ids", part)
            self._bind("attention_mask", self._mask[:, : start + at + part.shape[1]])
            self._session.run_with_iobinding(self._binding)
        return torch.from_numpy(self._logits.reshape(-1).copy())

    def adapt(self, adapter: Path | None) -> None:
        """Turn an adapter file on, or with None whichever is on off; the model stays loaded.

        What the cache holds was read with the adapter of that time: begin again at position 0.

        Raises:
            InputError: it is no adapter file, or not one for this model.
        """
        fed = {} if adapter is None else read_adapter(adapter, self._path, self._places)
        # ONNX Runtime leaves active adapters out of a run with bindings, so their matrices are bound as the inputs that
        # they are. What is no longer bound takes its default again.
        self._binding.clear_binding_inputs()
        for name, cache in self._caches.items():
            self._bind(name, cache)
        for name, value in fed.items():
            self._binding.bind_ortvalue_input(name, value)
        self._adapter = fed

    def adapted(self, adapter: Path, tokens: Sequence[int]) -> Tensor:
        """Return the logits after some tokens as `logits` does, of ONNX Runtime's own loader of adapters.

        An app without bindings runs so; the caches of this session take no part.
        """
        import onnxruntime

        loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
        empty = {name: cache[:, :, :0] for name, cache in self._caches.items()}
        given = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": self._mask[:, : len(tokens)],
        }
        (made,) = self._session.run(["logits"], {**given, **empty}, options)
        return torch.from_numpy(made.reshape(-1).copy())

    def close(self) -> None:
        """Let go of the model and of its caches."""
        super().close()
        del self._binding, self._caches, self._adapter

    def _bind_caches(self, session: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Give every layer one buffer that is past and present at once; its pages are taken as they are filled."""
        caches = {}
        for value in session.get_inputs()[2:]:
            cache = np.zeros((1, value.shape[1], self.context, value.shape[3]), dtype=np.float32)
            self._bind(value.name, cache)
            self._bind(value.name.replace("past_key_values", "present"), cache, out=True)
            caches[value.name] = cache
        return caches

    def _bind(self, name: str, array: np.ndarray[Any, Any], out: bool = False) -> None:
        bind = self._binding.bind_output if out else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class _Encoder(_Model):
    def outputs(self, tokens: Sequence[int], mask: Sequence[int], types: Sequence[int] = ()) -> Tensor:
        """Return float32: an embedding (width,), or scores of the shape of the task, without batch."""
        if not tokens or len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens do not fit a longest input of {self.context}")
        missing = [0] * max(0, int(self._metadata[_LEAST]) - len(tokens))
        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types or [0] * len(tokens)}
        wanted = [value.name for value in self._session.get_inputs()]
        inputs = {name: np.array([[*given[name], *missing]], dtype=np.int64) for name in wanted}
        return torch.from_numpy(self._session.run(None, inputs)[0][0])
