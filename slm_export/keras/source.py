"""A TensorFlow model as a source: a ``.keras`` file, or a SavedModel folder with its ``serving_default`` signature.

    is_tensorflow_model   whether a MODEL argument is one
    open_model            path -> TensorFlowModel: what goes in, what comes out, its variables, its own output

A model takes ids (batch, tokens), perhaps with a mask, and gives scores or an embedding (batch, width). What it gives
on the CPU in float32 is the oracle for the artifact. Code that a file brings along is never executed: Keras' safe mode
stays on, and a SavedModel is a graph.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm_export.errors import InputError, MissingComponentError
from slm_export.keras.archive import check_archive
from slm_export.machine import machine_errors

KERAS_FILE, SAVED_MODEL = ".keras", "saved_model.pb"
IDS, MASK = "input_ids", "attention_mask"
"""What the inputs are called from here on, whatever the model calls them."""

_OLD_FILES = (".h5", ".hdf5")
_SIGNATURE = "serving_default"
_BATCH = 32


def is_tensorflow_model(model: str | None) -> bool:
    """Return whether a MODEL argument is a Keras file or a SavedModel folder, by its name and files alone."""
    if model is None:
        return False
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return (path / SAVED_MODEL).is_file() and not (path / "config.json").exists()
    return path.suffix in (KERAS_FILE, *_OLD_FILES)


def name_of(path: Path) -> str:
    """Return what to call a model by its place: a file without its ending, a folder as it is."""
    resolved = path.resolve()
    return resolved.name if resolved.is_dir() else resolved.stem


def tensorflow() -> Any:
    """Return the module ``tensorflow``, on the CPU and quiet; MissingComponentError where it is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # The graph of a model that runs on another backend cannot be had.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    try:
        tf: Any = importlib.import_module("tensorflow")
    except ImportError as error:
        raise MissingComponentError(
            f"a TensorFlow model needs tensorflow, which cannot be imported ({error}); "
            "pip install 'slm-export[tensorflow]'"
        ) from error
    tf.get_logger().setLevel("ERROR")
    with suppress(RuntimeError):  # settled already by an earlier call
        tf.config.set_visible_devices([], "GPU")
    return tf


@dataclass(frozen=True)
class Port:
    """One input: the model's own name for it, its type, and its shape (None: any number)."""

    name: str
    dtype: Any
    batch: int | None
    tokens: int | None


@dataclass(frozen=True)
class TensorFlowModel:
    """A model open in TensorFlow."""

    path: Path
    architecture: str
    ports: Mapping[str, Port]
    """`IDS`, and `MASK` where the model has one."""
    output: str
    """The model's own name for its output."""
    width: int
    call: Callable[[dict[str, Any]], Any] = field(repr=False)
    """Takes tensors by the model's names, in its types; returns float (batch, width)."""
    variables: Mapping[str, Any] = field(repr=False)
    """Floats that can be assigned to, by their path."""
    owner: Any = field(default=None, repr=False)
    """What keeps the variables alive."""
    traced: dict[tuple[int | None, int | None], Any] = field(default_factory=dict, repr=False)
    """Functions by batch and tokens."""

    @property
    def name(self) -> str:
        """The name of the file or folder."""
        return name_of(self.path)

    @property
    def tokens(self) -> int | None:
        """Tokens of every input; None: any number."""
        return self.ports[IDS].tokens

    def function(self, batch: int | None, tokens: int | None) -> Any:
        """Return the model as a function of int32 (batch, tokens) for every port, in the order of the ports."""
        if (batch, tokens) not in self.traced:
            tf = tensorflow()

            def call(*given: Any) -> Any:
                ports = zip(self.ports.values(), given, strict=True)
                return tf.cast(self.call({p.name: tf.cast(g, p.dtype) for p, g in ports}), tf.float32)

            signature = [tf.TensorSpec((batch, tokens), tf.int32, name) for name in self.ports]
            self.traced[batch, tokens] = tf.function(call, input_signature=signature, autograph=False)
        return self.traced[batch, tokens]

    def outputs(self, ids: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> Tensor:
        """Return what the model itself gives for inputs of one length, float32 (inputs, width)."""
        tf = tensorflow()
        given = {IDS: ids, MASK: masks}
        function = self.function(self.ports[IDS].batch, self.tokens)
        at_once = _BATCH if self.ports[IDS].batch is None else 1
        results = []
        for at in range(0, len(ids), at_once):
            values = (tf.constant(given[name][at : at + at_once], tf.int32) for name in self.ports)
            results.append(torch.from_numpy(function(*values).numpy().copy()))
        return torch.cat(results)

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let some variables have other values for a while."""
        before = {name: self.variables[name].numpy() for name in values}
        try:
            for name, value in values.items():
                self.variables[name].assign(value.numpy())
            yield
        finally:
            for name, value in before.items():
                self.variables[name].assign(value)


def open_model(path: Path) -> TensorFlowModel:
    """Open a model.

    Raises:
        InputError: there is none, it is damaged, it needs code of its own, or it is no model of ids to scores.
        MissingComponentError: TensorFlow is not installed.
    """
    if path.suffix in _OLD_FILES:
        raise InputError(f"{path}: the old HDF5 format; save the model again: model.save('model.keras')")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_dir():
        check_archive(path)
    tensorflow()
    with machine_errors(f"read {path.name}", path):
        return _open_saved_model(path) if path.is_dir() else _open_keras(path)


def _open_keras(path: Path) -> TensorFlowModel:
    tf = tensorflow()
    model = _loaded(path)
    if not getattr(model, "inputs", None):
        raise InputError(
            f"{path}: a model without fixed inputs; build it with keras.Input and save it again, or give the folder "
            "that model.export(FOLDER) writes"
        )
    ports = _ports(path, {t.name: (t.dtype, tuple(t.shape)) for t in model.inputs})
    output = _output(path, {t.name: (t.dtype, tuple(t.shape)) for t in model.outputs})
    layers = dict.fromkeys(type(x).__name__ for x in model.layers if type(x).__name__ != "InputLayer")
    names = [t.name for t in model.inputs]

    def call(given: dict[str, Any]) -> Any:
        packed = tf.nest.pack_sequence_as(model.input, [given[name] for name in names])
        return tf.nest.flatten(model(packed, training=False))[0]

    variables = _named([(v.path, v) for v in model.variables if "float" in str(v.dtype)])
    width = int(model.outputs[0].shape[-1])
    return TensorFlowModel(
        path, f"{type(model).__name__}({', '.join(layers)})", ports, output, width, call, variables
    )


def _loaded(path: Path) -> Any:
    keras = importlib.import_module("keras")
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # a damaged zip, a damaged config, a damaged HDF5: each has its own type
        text = str(error)
        if "lambda" in text.lower():
            raise InputError(
                f"{path}: holds Python code (a Lambda layer), which is never executed here; put keras.ops or a "
                "registered layer in its place, or give the folder that model.export(FOLDER) writes"
            ) from error
        if "Could not locate class" in text or "register_keras_serializable" in text:
            raise InputError(
                f"{path}: has layers of its own Python code, which is never executed here; give the folder that "
                "model.export(FOLDER) writes"
            ) from error
        raise InputError(
            f"{path}: Keras cannot read it: {_first_line(error)}; save the model again"
        ) from error


def _open_saved_model(path: Path) -> TensorFlowModel:
    tf = tensorflow()
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # a damaged graph, missing variables: each has its own type
        raise InputError(
            f"{path}: TensorFlow cannot read this SavedModel: {_first_line(error)}; export the model again"
        ) from error
    signature = loaded.signatures.get(_SIGNATURE)
    if signature is None:
        known = ", ".join(loaded.signatures) or "none at all"
        raise InputError(
            f"{path}: has no signature '{_SIGNATURE}' (it has: {known}); export the model with model.export(FOLDER)"
        )
    inputs = {n: (s.dtype.name, tuple(s.shape)) for n, s in signature.structured_input_signature[1].items()}
    outputs = {n: (s.dtype.name, tuple(s.shape)) for n, s in signature.structured_outputs.items()}
    ports, output = _ports(path, inputs), _output(path, outputs)
    variables = _named([(v.name.removesuffix(":0"), v) for v in signature.variables if v.dtype.is_floating])
    width = int(outputs[output][1][-1] or 0)
    return TensorFlowModel(
        path, "SavedModel", ports, output, width, lambda given: signature(**given)[output], variables, loaded
    )


def _named(variables: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return variables by name; TensorFlow lets several have the same."""
    named: dict[str, Any] = {}
    for name, variable in variables:
        count = sum(known.split("#")[0] == name for known in named)
        named[f"{name}#{count + 1}" if count else name] = variable
    return named


def _ports(path: Path, inputs: Mapping[str, tuple[Any, tuple[int | None, ...]]]) -> dict[str, Port]:
    """Return the ports of inputs, name -> (type, shape); InputError where they are not ids and perhaps a mask."""
    shown = ", ".join(f"{name}: {dtype}{list(shape)}" for name, (dtype, shape) in inputs.items())
    masks = [name for name in inputs if "mask" in name.lower()] if len(inputs) > 1 else []
    rest = [name for name in inputs if name not in masks]
    if len(rest) != 1 or len(masks) > 1:
        raise InputError(f"{path}: inputs ({shown}); one input of ids is wanted, perhaps with a mask")
    ports: dict[str, Port] = {}
    for port, name in ((IDS, rest[0]), *((MASK, mask) for mask in masks)):
        dtype, shape = inputs[name]
        if "string" in str(dtype):
            raise InputError(
                f"{path}: input {name} is text, which LiteRT cannot read; export the part of the model that comes "
                "after the vectorization, with ids for its input"
            )
        if len(shape) != 2 or shape[0] not in (None, 1):
            raise InputError(
                f"{path}: input {name} has shape {list(shape)}; ids of shape (batch, tokens) are wanted"
            )
        ports[port] = Port(name, dtype, *shape)
    return ports


def _output(path: Path, outputs: Mapping[str, tuple[Any, tuple[int | None, ...]]]) -> str:
    shown = ", ".join(f"{name}: {dtype}{list(shape)}" for name, (dtype, shape) in outputs.items())
    if len(outputs) != 1:
        raise InputError(f"{path}: outputs ({shown}); one output of scores or of an embedding is wanted")
    ((name, (dtype, shape)),) = outputs.items()
    if len(shape) != 2 or shape[1] is None or "float" not in str(dtype):
        raise InputError(f"{path}: output {shown}; float scores or an embedding (batch, width) are wanted")
    return name


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
