"""Trace a module and return its ONNX graph, which names its weights and does not hold them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from slm_export import __version__
from slm_export.errors import InputError
from slm_export.exporters.onnx_fused import fuse
from slm_export.exporters.onnx_places import leave_open
from slm_export.exporters.onnx_stamp import stamp

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from slm_export.graph.layers import Layers

OPSET = 23
"""The first with ``RMSNormalization`` and ``RotaryEmbedding``."""
_CONTRIB = "com.microsoft"
_LARGEST_FOLDED = 1 << 16  # values of a constant that may be computed now

Shape = Sequence[int | str]


def convert(
    program: ExportedProgram,
    weights: Mapping[str, str],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    metadata: Mapping[str, str],
    layers: Layers | None = None,
    places: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[bytes, set[str]]:
    """Return a ModelProto of a traced program, serialized, and the names of the weights that it uses and does not hold.

    Given   weights: what the tracer calls a matrix or vector -> its name in the file
            inputs, outputs: their names and shapes, in the order of the program
            metadata: what the file is to say of itself
            layers: where the program is of the first three, all of them
            places: inputs that adapters feed, and the size of each that is fixed
    """
    import onnx_ir as ir

    model = translate(program)
    taken = _take_out(model.graph, weights)
    ends = list(model.graph.inputs)
    # Inputs for now: nothing is computed from what has no value yet.
    model.graph.inputs.extend(taken)
    _simplify(model)
    if layers is not None:
        past = ends[2:]
        stamp(model.graph, past, layers)
        ends[2:] = past
    opened = leave_open(model.graph, places)
    own = set(map(id, (*ends, *opened)))
    used = {value.name for value in model.graph.inputs if id(value) not in own and value.uses()}
    _tidy(model)
    model.graph.inputs[:] = ends
    _clear_metadata(model)
    _name_ends(model.graph, inputs, outputs)
    model.graph.inputs.extend(opened)
    model.graph.name = "model"
    model.producer_name, model.producer_version = "slm-export", __version__
    model.metadata_props.update(metadata)
    model.opset_imports[_CONTRIB] = 1
    return ir.to_proto(model).SerializeToString(deterministic=True), used


def translate(program: ExportedProgram) -> Any:
    """Return the onnx_ir model of a traced program; InputError where an operator has no translation."""
    import torch

    try:
        with _quiet():
            made = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        if (operator := _unknown_operator(error)) is None:
            raise
        raise InputError(f"onnx has no operator for {operator}; choose another --format") from error
    assert made is not None
    return made.model


def _unknown_operator(error: BaseException | None) -> str | None:
    """Return the operator that the exporter has no translation of, in torch's own spelling."""
    while error is not None:
        if match := re.search(
            r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'", str(error)
        ):
            return f"{match[1]}.{match[2]}"
        error = error.__cause__
    return None


def _simplify(model: Any) -> None:
    """Compute constants, and keep one of what is there twice.

    ``optimizer.optimize`` also rewrites patterns, which takes longer than all of this; ONNX Runtime does that too.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, input_size_limit=_LARGEST_FOLDED, output_size_limit=_LARGEST_FOLDED)
        optimizer.remove_unused_nodes(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    fuse(model)
    optimizer.remove_unused_nodes(model)


def _tidy(model: Any) -> None:
    from onnx_ir.passes import common

    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)


def _take_out(graph: Any, weights: Mapping[str, str]) -> list[Any]:
    """Take weights out of the graph, and give them their names; return one value for each."""
    import onnx_ir as ir

    values: dict[str, Any] = {}
    for traced in [name for name in graph.initializers if name in weights]:
        value = graph.initializers.pop(traced)
        name = weights[traced]
        if name in values:  # a tied head
            ir.convenience.replace_all_uses_with(value, values[name])
            continue
        value.name, value.const_value = name, None
        values[name] = value
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix("model.")  # the wrapper's own prefix
    return list(values.values())


def _clear_metadata(model: Any) -> None:
    """Remove what the exporter notes for its own debugging: stack traces, paths of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    for value in _values(model.graph):
        value.metadata_props.clear()


def _values(graph: Any) -> list[Any]:
    made = [output for node in graph for output in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]


def _name_ends(graph: Any, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> None:
    import onnx_ir as ir

    for value in _values(graph):
        if value.name in inputs or value.name in outputs:
            value.name = f"{value.name}.inner"
    for values, ends in ((graph.inputs, inputs), (graph.outputs, outputs)):
        assert len(values) == len(ends), (values, ends)
        for value, (name, shape) in zip(values, ends.items(), strict=True):
            value.name, value.shape = name, ir.Shape(shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling of packages that it can do without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def trace(module: nn.Module, example: tuple[Any, ...], dynamic: tuple[Any, ...]) -> ExportedProgram:
    """Return torch.export's graph of a module."""
    import torch
    from torch.export import export

    with torch.no_grad():
        return export(module, example, dynamic_shapes=dynamic, strict=False)
