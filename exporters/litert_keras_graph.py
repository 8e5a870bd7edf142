"""A TensorFlow model -> the float graph that TensorFlow's own converter makes of it, every variable a constant.

Only plain LiteRT operators may come out: what would need TensorFlow's (flex) or an app's own (custom) is refused here,
by name, before anything is written.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from slm_export.errors import InputError
from slm_export.exporters.litert_stamp import without_dead
from slm_export.keras.source import TensorFlowModel, tensorflow

LARGEST = 2_000_000_000
"""Bytes of floats that a flatbuffer, with its 32-bit offsets, has room for while it is converted."""

_ADVICE = "export the part of the model between ids and scores that does without"
_STATEFUL = (
    "VAR_HANDLE",
    "READ_VARIABLE",
    "ASSIGN_VARIABLE",
    "HASHTABLE",
    "HASHTABLE_FIND",
    "HASHTABLE_LOOKUP",
)


def lowered(source: TensorFlowModel, tokens: int) -> Any:
    """Return a model as schema.fbs' objects.

    Raises:
        InputError: it needs operators that LiteRT has not, or state that lasts from call to call.
    """
    size = sum(4 * math.prod(v.shape) for v in source.variables.values())
    if size > LARGEST:
        raise InputError(
            f"{source.path}: {size:,} bytes of weights; TensorFlow's converter has room for {LARGEST:,}"
        )
    tf = tensorflow()
    constants = importlib.import_module("tensorflow.python.framework.convert_to_constants")
    try:
        function = source.function(1, tokens).get_concrete_function()
        frozen = constants.convert_variables_to_constants_v2(function, lower_control_flow=False)
        packed = tf.lite.TFLiteConverter.from_concrete_functions([_for_one(frozen)]).convert()
    except Exception as error:  # the converter's own type is not public, and tracing can fail in any way
        raise InputError(f"{source.path}: {_complaint(str(error))}") from error
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    graph = schema.ModelT.InitFromPackedBuf(packed, 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    odd = sorted({n for code in graph.operatorCodes if (n := _odd(code, names))})
    if odd:
        raise InputError(
            f"{source.path}: needs {', '.join(odd)}, which LiteRT has no operator for; {_ADVICE}"
        )
    for subgraph in graph.subgraphs:
        _without_shape_work(graph, subgraph, schema)
    return graph


def _for_one(function: Any) -> Any:
    """Return a frozen function whose lists of states are of a batch of one.

    A SavedModel was traced for batches of any size, and its recurrent layers say so where they make their lists, which
    the converter does not take. That the open size is the batch is proved by the comparison with the model.
    """
    tf = tensorflow()
    graph = function.graph.as_graph_def()
    nodes = {node.name: node for node in graph.node}
    changed = False
    for node in graph.node:
        if node.op not in ("TensorListReserve", "TensorListFromTensor", "TensorListStack"):
            continue
        for given in node.input:
            shape = nodes.get(given.split(":")[0])
            if (
                shape is None
                or shape.op != "Const"
                or "int" not in tf.dtypes.as_dtype(shape.attr["dtype"].type).name
            ):
                continue
            sizes = tf.make_ndarray(shape.attr["value"].tensor)
            if sizes.ndim == 1 and len(sizes) > 1 and sizes[0] == -1:
                sizes = np.array([1, *sizes[1:]], sizes.dtype)
                shape.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(sizes))
                changed = True
    if not changed:
        return function
    wrapped = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph, name=""), [])
    names = ([t.name for t in function.inputs], [t.name for t in function.outputs])
    return wrapped.prune(*([wrapped.graph.get_tensor_by_name(name) for name in side] for side in names))


def _without_shape_work(graph: Any, subgraph: Any, schema: Any) -> None:
    """Make constants of ``ZEROS_LIKE``, and drop what only led there.

    A recurrent layer of a SavedModel computes its first step a second time, for no more than the shape of its output.
    """
    kept = []
    for op in subgraph.operators:
        code = graph.operatorCodes[op.opcodeIndex]
        out = subgraph.tensors[int(op.outputs[0])]
        if code.builtinCode != schema.BuiltinOperator.ZEROS_LIKE or out.shapeSignature is not None:
            kept.append(op)
            continue
        buffer = schema.BufferT()
        width = 4 if out.type in (schema.TensorType.FLOAT32, schema.TensorType.INT32) else 1
        buffer.data = np.zeros(width * math.prod(int(size) for size in out.shape), np.uint8)
        graph.buffers.append(buffer)
        out.buffer = len(graph.buffers) - 1
    subgraph.operators = kept
    without_dead(subgraph, {int(index): "" for index in subgraph.outputs})


def _odd(code: Any, names: Mapping[int, str]) -> str | None:
    """Return what to call an operator that plain LiteRT does not run, or that remembers from call to call."""
    if code.customCode:
        return str(code.customCode.decode())
    name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
    return name if name in _STATEFUL else None


def _complaint(text: str) -> str:
    """Return what the converter means, of the many lines that it says."""
    needed = re.findall(r"^(?:Flex|Custom) ops: *(.+)$", text, re.MULTILINE | re.IGNORECASE)
    needed += re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", text)
    operators = sorted({name.strip() for line in needed for name in line.split(",")})
    if operators:
        return f"needs {', '.join(operators)}, which LiteRT has no operator for; {_ADVICE}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"TensorFlow's converter cannot convert it: {lines[0][:300] if lines else 'without a word'}; {_ADVICE}"
