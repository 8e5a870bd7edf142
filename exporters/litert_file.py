"""A flatbuffer whose weights are inputs -> the file: codes and scales become constants, written one by one.

A matrix keeps the name that it has in the checkpoint. What is on the grid is stored as TFLite has it:

    int8   scale per row in the tensor's quantization, zero points 0
    int4   ``BlockwiseQuantization``: scales in a float16 tensor of their own; two codes per byte, even column low

The bytes of weights lie behind the flatbuffer, at offsets that its buffers name, so they are never in memory together,
and one buffer serves every function and both ends of a tied vocabulary.

Source: TensorFlow's schema.fbs (Buffer.offset, BlockwiseQuantization).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.litert_stamp import Roles
from slm_export.weights import Dense, Quantized

ALIGNMENT = 64
"""Of weights in the file, in bytes."""

_IDENTIFIER = b"TFL3"


@dataclass(frozen=True)
class Function:
    """A subgraph and what its inputs and outputs are."""

    name: str
    index: int
    inputs: Roles
    outputs: Roles


@dataclass(frozen=True)
class _Stored:
    """Bytes behind the flatbuffer."""

    buffer: int
    size: int
    content: Callable[[], bytes]


class _PackedOnce:
    """A table that all functions refer to: 12 bytes per row of every matrix would count in each."""

    def __init__(self, table: Any) -> None:
        self._table, self._builder, self._offset = table, None, 0

    def Pack(self, builder: Any) -> int:
        """Return where the table is in ``builder``."""
        if self._builder is not builder:
            self._builder, self._offset = builder, self._table.Pack(builder)
        return self._offset


class Placer:
    """Puts the weights of a checkpoint into the functions of a flatbuffer; one use for one file."""

    def __init__(self, model: Any, checkpoint: Checkpoint, vectors: Mapping[str, Tensor]) -> None:
        self._schema = importlib.import_module("ai_edge_litert.schema_py_generated")
        self._model, self._checkpoint, self._vectors = model, checkpoint, vectors
        self._stored: dict[str, _Stored] = {}
        self._rows_scales: dict[str, _PackedOnce] = {}

    def place(self, functions: list[Function]) -> None:
        """Make constants of the weights of some functions, and signatures of what is left of their inputs."""
        self._model.signatureDefs = []
        for function in functions:
            graph = self._model.subgraphs[function.index]
            weights = {t: n for t, n in function.inputs.items() if self._is_weight(n)}
            for tensor, name in weights.items():
                self._place(graph, tensor, name)
            self._use_kernels(graph, weights)
            rest = {t: n for t, n in function.inputs.items() if t not in weights}
            graph.name = function.name.encode()
            graph.inputs = np.array(list(rest), dtype=np.int32)
            graph.outputs = np.array(list(function.outputs), dtype=np.int32)
            self._sign(function, rest)
            self._name(graph, function, rest)

    def write(self, path: Path) -> None:
        """Write the file."""
        buffers = self._model.buffers
        for stored in self._stored.values():
            # Any number above 1, so that the field is there: the real one does not change the length.
            buffers[stored.buffer].offset, buffers[stored.buffer].size = 2, stored.size
        end = len(self._packed())
        for stored in self._stored.values():
            end = -(-end // ALIGNMENT) * ALIGNMENT
            buffers[stored.buffer].offset = end
            end += stored.size
        with open(path, "wb") as file:
            file.write(self._packed())
            for name, stored in self._stored.items():
                file.seek(buffers[stored.buffer].offset)
                written = file.write(stored.content())
                assert written == stored.size, name

    def _packed(self) -> bytes:
        builder = importlib.import_module("flatbuffers").Builder(1 << 20)
        builder.Finish(self._model.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())

    def _is_weight(self, name: str) -> bool:
        return name in self._checkpoint.weights or name in self._vectors

    def _place(self, graph: Any, index: int, name: str) -> None:
        tensor, types = graph.tensors[index], self._schema.TensorType
        weight = self._checkpoint.weights.get(name)
        tensor.name, tensor.shapeSignature = name.encode(), None
        if name in self._vectors or weight is None:
            vector = self._vectors[name]
            tensor.buffer = self._buffer(name, 4 * vector.numel(), lambda: _bytes(vector.to(torch.float32)))
        elif isinstance(weight, Quantized):
            tensor.type = types.INT8 if weight.bits == 8 else types.INT4
            size = weight.count * weight.bits // 8
            tensor.buffer = self._buffer(name, size, lambda: _bytes(weight.packed))
            tensor.quantization = self._quantization(graph, name, weight)
        else:
            assert isinstance(weight, Dense), "tables are refused when a plan is made"
            tensor.type = types.FLOAT16 if weight.dtype == torch.float16 else types.FLOAT32
            tensor.buffer = self._buffer(name, _float_size(weight), lambda: _bytes(_floats(weight)))

    def _quantization(self, graph: Any, name: str, weight: Quantized) -> Any:
        made = self._schema.QuantizationParametersT()
        if weight.bits == 8:
            made.scale = weight.scales.squeeze(1).numpy()
            made.zeroPoint = np.zeros(weight.shape[0], dtype=np.int64)
            return self._rows_scales.setdefault(name, _PackedOnce(made))
        groups = weight.count // weight.group
        scales = self._schema.TensorT()
        scales.name, scales.type = f"{name}_scales".encode(), self._schema.TensorType.FLOAT16
        scales.shape = np.array([weight.shape[0], weight.shape[1] // weight.group], dtype=np.int32)
        scales.buffer = self._buffer(scales.name.decode(), 2 * groups, lambda: _bytes(weight.scales.half()))
        graph.tensors.append(scales)
        made.detailsType = self._schema.QuantizationDetails.BlockwiseQuantization
        made.details = self._schema.BlockwiseQuantizationT()
        made.details.scales, made.details.zeroPoints = len(graph.tensors) - 1, -1
        made.details.blockSize = weight.group
        return made

    def _use_kernels(self, graph: Any, weights: Roles) -> None:
        """Make ``FULLY_CONNECTED`` of products with a constant, a bias that follows included."""
        schema, operators = self._schema, []
        float16 = {t: self._as_float32(graph, t) for t in weights if self._is_half(graph, t)}
        operators += [operator for _, operator in float16.values()]
        users: dict[int, list[Any]] = {}
        for op in graph.operators:
            for tensor in op.inputs:
                users.setdefault(int(tensor), []).append(op)
        dropped: set[int] = set()
        matmul = self._opcode(schema.BuiltinOperator.BATCH_MATMUL)
        for op in graph.operators:
            if id(op) in dropped:
                continue
            op.inputs = np.array(
                [float16[int(t)][0] if int(t) in float16 else t for t in op.inputs], dtype=np.int32
            )
            if op.opcodeIndex == matmul and int(op.inputs[1]) in {
                *weights,
                *(t for t, _ in float16.values()),
            }:
                self._fully_connect(graph, op, users, weights, dropped)
            operators.append(op)
        graph.operators = [op for op in operators if id(op) not in dropped]

    def _fully_connect(
        self, graph: Any, op: Any, users: Mapping[int, list[Any]], weights: Roles, dropped: set[int]
    ) -> None:
        schema = self._schema
        quantized = graph.tensors[int(op.inputs[1])].quantization is not None
        op.opcodeIndex = self._opcode(schema.BuiltinOperator.FULLY_CONNECTED)
        op.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        op.builtinOptions = schema.FullyConnectedOptionsT(
            keepNumDims=True, asymmetricQuantizeInputs=quantized
        )
        bias, following = -1, users.get(int(op.outputs[0]), [])
        if len(following) == 1 and following[0].opcodeIndex == self._opcode(schema.BuiltinOperator.ADD):
            (add,) = following
            vectors = [int(t) for t in add.inputs if weights.get(int(t), "") in self._vectors]
            if len(vectors) == 1 and list(graph.tensors[vectors[0]].shape) == [self._rows(graph, op)]:
                bias = vectors[0]
                op.outputs = add.outputs
                op.builtinOptions.fusedActivationFunction = add.builtinOptions.fusedActivationFunction
                dropped.add(id(add))
        op.inputs = np.array([*op.inputs, bias], dtype=np.int32)

    def _rows(self, graph: Any, op: Any) -> int:
        return int(graph.tensors[int(op.inputs[1])].shape[0])

    def _is_half(self, graph: Any, tensor: int) -> bool:
        return bool(graph.tensors[tensor].type == self._schema.TensorType.FLOAT16)

    def _as_float32(self, graph: Any, tensor: int) -> tuple[int, Any]:
        """Return a float32 tensor of a float16 constant, and the operation that makes it."""
        made = self._schema.TensorT()
        made.shape, made.type = graph.tensors[tensor].shape, self._schema.TensorType.FLOAT32
        graph.tensors.append(made)
        op = self._schema.OperatorT()
        op.opcodeIndex = self._opcode(self._schema.BuiltinOperator.DEQUANTIZE)
        op.inputs = np.array([tensor], dtype=np.int32)
        op.outputs = np.array([len(graph.tensors) - 1], dtype=np.int32)
        return int(op.outputs[0]), op

    def _opcode(self, builtin: int) -> int:
        codes = self._model.operatorCodes
        for index, code in enumerate(codes):
            if code.builtinCode == builtin:
                return index
        versions = {self._schema.BuiltinOperator.FULLY_CONNECTED: 13}
        made = self._schema.OperatorCodeT(
            builtinCode=builtin, deprecatedBuiltinCode=min(builtin, 127), version=versions.get(builtin, 3)
        )
        codes.append(made)
        return len(codes) - 1

    def _sign(self, function: Function, inputs: Roles) -> None:
        made = self._schema.SignatureDefT()
        made.signatureKey, made.subgraphIndex = function.name.encode(), function.index
        made.inputs = [self._tensor_map(t, n) for t, n in inputs.items()]
        made.outputs = [self._tensor_map(t, n) for t, n in function.outputs.items()]
        self._model.signatureDefs.append(made)

    def _tensor_map(self, tensor: int, name: str) -> Any:
        return self._schema.TensorMapT(name=name.encode(), tensorIndex=tensor)

    def _name(self, graph: Any, function: Function, inputs: Roles) -> None:
        """Name inputs and outputs, by which the runtime tells them apart, and leave what is between without.

        The converter makes names of paths in Python, some 100 bytes each.
        """
        buffers = {stored.buffer for stored in self._stored.values()}
        for tensor in graph.tensors:
            if tensor.buffer not in buffers:
                tensor.name = None
        for index, name in inputs.items():
            graph.tensors[index].name = f"{function.name}_{name}".encode()
        for index, name in function.outputs.items():
            graph.tensors[index].name = f"{function.name}_{name}_output".encode()

    def _buffer(self, name: str, size: int, content: Callable[[], bytes]) -> int:
        if name not in self._stored:
            self._model.buffers.append(self._schema.BufferT())
            self._stored[name] = _Stored(len(self._model.buffers) - 1, size, content)
        return self._stored[name].buffer


def _float_size(weight: Dense) -> int:
    return weight.count * (2 if weight.dtype == torch.float16 else 4)


def _floats(weight: Dense) -> Tensor:
    return weight.load() if weight.dtype == torch.float16 else weight.float32()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
