"""The converted graph of a TensorFlow model, and a checkpoint on the grid -> the file.

FULLY_CONNECTED   takes int8 rows as they are, and rounds its input to int8 itself
CONV_2D           the same, a row being a filter
GATHER            has no kernel from int8 to float: EMBEDDING_LOOKUP, which has, takes its place
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slm_export.bundles.checksums import sha256_file
from slm_export.checkpoint import Checkpoint
from slm_export.exporters.litert_file import Function, Placer
from slm_export.exporters.litert_keras import Converted, Place
from slm_export.results import Artifact, Signature
from slm_export.weights import Quantized

_VERSIONS = {"FULLY_CONNECTED": 13, "CONV_2D": 5}
"""Of operators whose filters have a scale per row."""

_HIGHEST = {"RESHAPE": 1, "CAST": 6}
"""Of operators that the converter has not put in: a runtime refuses one it has not heard of."""


def write(
    converted: Converted, checkpoint: Checkpoint, ports: list[str], output: tuple[str, int], path: Path
) -> Artifact:
    """Write the file; ``checkpoint`` is the one of ``converted``, quantized. One use of one ``converted``.

    Given   ports: names of the inputs, in their order; output: its name and its width
    """
    tokens = checkpoint.positions
    _Writer(converted, checkpoint).finish(ports, output[0], path)
    size = path.stat().st_size
    signature = Signature(
        f"encode_{tokens}",
        dict.fromkeys(ports, f"int32[1, {tokens}]"),
        {output[0]: f"float32[1, {output[1]}]"},
    )
    return Artifact(
        path=path,
        format="litert",
        bytes=size,
        sha256=sha256_file(path),
        bits_per_weight=8 * size / checkpoint.parameters,
        signatures=(signature,),
    )


class _Writer(Placer):
    def __init__(self, converted: Converted, checkpoint: Checkpoint) -> None:
        super().__init__(converted.graph, checkpoint, {})
        self._places = converted.places

    def finish(self, ports: list[str], output: str, path: Path) -> None:
        """Put the codes in, name and sign what goes in and out, and write."""
        named: set[Place] = set()
        main = self._model.subgraphs[0]
        inputs = _ports(main, ports)
        for name, weight in self._checkpoint.weights.items():
            number, index = self._places[name]
            graph = self._model.subgraphs[number]
            named.add((number, index))
            if isinstance(weight, Quantized):
                self._place(graph, index, name)
                self._adapt(graph, index)
            else:
                graph.tensors[index].name = name.encode()
        self._let_go()
        self._forget_names(named)
        function = Function(
            f"encode_{self._checkpoint.positions}",
            0,
            inputs,
            {int(main.outputs[0]): output},
        )
        for roles in (function.inputs, function.outputs):
            for index, name in roles.items():
                main.tensors[index].name = name.encode()
        self._model.signatureDefs = []
        self._sign(function, function.inputs)
        self.write(path)

    def _adapt(self, graph: Any, index: int) -> None:
        """Let the operators that read a tensor read it as int8."""
        schema = self._schema
        gather = self._opcode(schema.BuiltinOperator.GATHER)
        operators = []
        for op in graph.operators:
            if index not in op.inputs:
                operators.append(op)
            elif op.opcodeIndex == gather:
                operators += self._looked_up(graph, op)
            else:
                if op.builtinOptionsType == schema.BuiltinOptions.FullyConnectedOptions:
                    op.builtinOptions.asymmetricQuantizeInputs = True
                operators.append(op)
        graph.operators = operators
        for name, version in _VERSIONS.items():
            for code in self._model.operatorCodes:
                if code.builtinCode == getattr(schema.BuiltinOperator, name):
                    code.version = max(code.version, version)

    def _looked_up(self, graph: Any, op: Any) -> list[Any]:
        """Return what takes the place of a GATHER: the look-up wants its ids in one row, and gives rows."""
        schema = self._schema
        table, ids, out = int(op.inputs[0]), int(op.inputs[1]), int(op.outputs[0])
        shape, width = [int(n) for n in graph.tensors[ids].shape], int(graph.tensors[table].shape[1])
        count = int(np.prod(shape))
        given = graph.tensors[ids].type
        row = self._tensor(graph, [count], given)
        rows = self._tensor(graph, [count, width], schema.TensorType.FLOAT32)
        made = [self._reshaped(graph, ids, row, [count])]
        if given != schema.TensorType.INT32:
            narrow = self._tensor(graph, [count], schema.TensorType.INT32)
            made.append(self._operator("CAST", [row], narrow))
            row = narrow
        made.append(self._operator("EMBEDDING_LOOKUP", [row, table], rows))
        made.append(self._reshaped(graph, rows, out, [*shape, width]))
        return made

    def _operator(self, name: str, inputs: list[int], output: int) -> Any:
        made = self._schema.OperatorT()
        made.opcodeIndex = self._opcode(getattr(self._schema.BuiltinOperator, name))
        code = self._model.operatorCodes[made.opcodeIndex]
        code.version = min(code.version, _HIGHEST.get(name, code.version))
        made.inputs, made.outputs = _indices(*inputs), _indices(output)
        return made

    def _reshaped(self, graph: Any, given: int, result: int, shape: list[int]) -> Any:
        schema = self._schema
        size = self._tensor(graph, [len(shape)], schema.TensorType.INT32)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.array(shape, np.int32).tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        graph.tensors[size].buffer = len(self._model.buffers) - 1
        made = self._operator("RESHAPE", [given, size], result)
        made.builtinOptionsType = schema.BuiltinOptions.ReshapeOptions
        made.builtinOptions = schema.ReshapeOptionsT()
        made.builtinOptions.newShape = np.array(shape, np.int32)
        return made

    def _tensor(self, graph: Any, shape: list[int], type_: int) -> int:
        made = self._schema.TensorT()
        made.shape, made.type = np.array(shape, np.int32), type_
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def _let_go(self) -> None:
        """Empty the buffers that no tensor reads any more: those of floats that are codes now."""
        read = {tensor.buffer for graph in self._model.subgraphs for tensor in graph.tensors}
        read |= {entry.buffer for entry in self._model.metadata or []}
        for index, buffer in enumerate(self._model.buffers):
            if index not in read and index not in {stored.buffer for stored in self._stored.values()}:
                buffer.data = None

    def _forget_names(self, kept: set[Place]) -> None:
        """Leave what is no weight without a name: the converter's are paths, and longer than the operators."""
        for number, graph in enumerate(self._model.subgraphs):
            for index, tensor in enumerate(graph.tensors):
                if (number, index) not in kept:
                    tensor.name = None


def _ports(main: Any, ports: list[str]) -> dict[int, str]:
    """Return input -> its name, which the converter has put into names of its own."""
    found = {int(i): port for i in main.inputs for port in ports if port in main.tensors[i].name.decode()}
    assert len(found) == len(main.inputs) == len(ports), found
    return found


def _indices(*indices: int) -> Any:
    return np.array(indices, dtype=np.int32)
