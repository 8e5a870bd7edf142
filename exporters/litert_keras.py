"""A TensorFlow model -> ``model.tflite``: TensorFlow's own converter makes the graph in float32, and the matrices of it
that LiteRT has 8-bit kernels for become a checkpoint, so that the passes quantize them as those of any other model.

Given   a model of int32 ids (1, tokens), perhaps with a mask
Result  function ``encode_<tokens>`` from ids and mask to an embedding or scores, as encoders of other sources have it

A constant of the graph is named after the variable of the model whose values it holds, found by the values themselves:
the converter keeps no record of it. Only such a constant is quantized, because only it can be put back into the model,
for the model to say what the codes cost.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint, Role
from slm_export.errors import InputError
from slm_export.exporters.litert_keras_graph import lowered
from slm_export.keras.source import IDS, TensorFlowModel
from slm_export.weights import Dense

Place = tuple[int, int]
"""A tensor: subgraph, index."""


@dataclass(frozen=True)
class Origin:
    """How the rows of a constant lie in a variable: split into (rows, columns) here, and perhaps turned."""

    shape: tuple[int, ...]
    split: int
    turned: bool

    def matrix(self, values: Any) -> Any:
        """Return a variable as the constant has it, (rows, columns)."""
        rows = int(np.prod(self.shape[: self.split]))
        flat = values.reshape(rows, -1)
        return flat.T if self.turned else flat

    def back(self, matrix: Tensor) -> Tensor:
        """Undo `matrix`."""
        return (matrix.T if self.turned else matrix).reshape(self.shape).contiguous()


@dataclass(frozen=True)
class Converted:
    """The float graph and what its constants are."""

    graph: Any
    """schema.fbs' Model as objects."""
    checkpoint: Checkpoint
    places: Mapping[str, Place]
    """Weight -> where it is in the graph."""
    origins: Mapping[str, Mapping[str, Origin]]
    """Weight -> the variables that hold it."""
    reasons: Mapping[str, str]
    """Weight -> why it stays in float."""
    rows: int
    """Of the table that ids are looked up in."""


@dataclass
class _Found:
    values: Any
    place: Place
    role: Role
    reason: str
    origins: dict[str, Origin]


def convert(source: TensorFlowModel, tokens: int, task: str) -> Converted:
    """Convert a model for inputs of ``tokens`` tokens.

    Raises:
        InputError: it needs operators that LiteRT has not, or nothing of it can be looked up by ids.
    """
    graph = lowered(source, tokens)
    reader = _Constants(graph, source)
    found = reader.read()
    rows = reader.looked_up(found)
    weights = {name: _dense(one) for name, one in found.items()}
    checkpoint = Checkpoint(
        folder=source.path,
        name=source.name,
        architecture=source.architecture,
        task=task,
        config=None,
        weights=weights,
        roles={name: one.role for name, one in found.items()},
        positions=tokens,
        unused=_unused(source, found),
    )
    return Converted(
        graph,
        checkpoint,
        {name: one.place for name, one in found.items()},
        {name: one.origins for name, one in found.items()},
        {name: one.reason for name, one in found.items() if one.reason},
        rows,
    )


class _Constants:
    """Reads the float constants of a graph."""

    def __init__(self, graph: Any, source: TensorFlowModel) -> None:
        self._schema = importlib.import_module("ai_edge_litert.schema_py_generated")
        self._graph, self._source = graph, source
        self._values = {name: variable.numpy() for name, variable in source.variables.items()}
        self._operators = {
            value: name
            for name, value in vars(self._schema.BuiltinOperator).items()
            if isinstance(value, int)
        }

    def read(self) -> dict[str, _Found]:
        """Return every float constant by its name: that of the variable it holds, or the converter's."""
        found: dict[str, _Found] = {}
        for number, subgraph in enumerate(self._graph.subgraphs):
            users = self._users(subgraph)
            for index, tensor in enumerate(subgraph.tensors):
                data = self._graph.buffers[tensor.buffer].data
                if tensor.type != self._schema.TensorType.FLOAT32 or data is None or index not in users:
                    continue
                values = np.frombuffer(data.tobytes(), np.float32).reshape(list(tensor.shape))
                self._add(found, (number, index), values, users[index], (tensor.name or b"").decode())
        return found

    def looked_up(self, found: Mapping[str, _Found]) -> int:
        """Return the rows of the smallest table that ids are looked up in; mark every such table."""
        main = self._graph.subgraphs[0]
        ids = next(int(i) for i in main.inputs if IDS in main.tensors[i].name.decode())
        made = {int(out): op for op in main.operators for out in op.outputs}
        rows: list[int] = []
        for one in found.values():
            if one.role != "table":
                continue
            number, index = one.place
            looks = [op for op in main.operators if number == 0 and self.is_lookup(op, index)]
            if any(_reaches(int(op.inputs[1]), ids, made) for op in looks):
                one.role = "embedding"
                rows.append(one.values.shape[0])
        if not rows:
            raise InputError(f"{self._source.path}: looks up its input in no table; a model of ids is wanted")
        return min(rows)

    def name_of(self, op: Any) -> str:
        """Return the name of an operator."""
        code = self._graph.operatorCodes[op.opcodeIndex]
        name: str = self._operators[max(code.builtinCode, code.deprecatedBuiltinCode)]
        return name

    def is_lookup(self, op: Any, table: int) -> bool:
        """Return whether an operator takes rows of a table."""
        if self.name_of(op) != "GATHER" or int(op.inputs[0]) != table:
            return False
        options = op.builtinOptions
        return options is None or not (options.axis or options.batchDims)

    def _users(self, subgraph: Any) -> dict[int, list[tuple[Any, int]]]:
        users: dict[int, list[tuple[Any, int]]] = {}
        for op in subgraph.operators:
            for position, index in enumerate(op.inputs):
                users.setdefault(int(index), []).append((op, position))
        return users

    def _add(
        self, found: dict[str, _Found], place: Place, values: Any, users: list[tuple[Any, int]], made: str
    ) -> None:
        origins = dict(self._origins(values))
        role, reason = self._role(place[1], values, users)
        if role != "other" and not origins:
            role, reason = "other", "the converter made it of several weights: it is no variable of the model"
        name = base = next(iter(origins), made or f"constant {place[0]}.{place[1]}")
        # Never two tensors under one name, though they hold the same: XNNPACK's cache of packed weights takes a matrix
        # for packed already even where another bias, or none, goes with it.
        count = 1
        while name in found:
            count += 1
            name = f"{base}#{count}"
        found[name] = _Found(values, place, role, reason, origins)

    def _origins(self, values: Any) -> Iterator[tuple[str, Origin]]:
        if values.size < 2:
            return
        flat = values.reshape(values.shape[0], -1) if values.ndim > 1 else values.reshape(1, -1)
        for name, variable in self._values.items():
            if variable.size != values.size:
                continue
            if max(values.shape) == values.size and np.array_equal(variable.reshape(-1), values.reshape(-1)):
                yield name, Origin(variable.shape, 0, False)
                continue
            for split in range(1, max(2, variable.ndim)):
                for turned in (False, True):
                    origin = Origin(tuple(variable.shape), split, turned)
                    matrix = origin.matrix(variable)
                    if matrix.shape == flat.shape and np.array_equal(matrix, flat):
                        yield name, origin
                        break
                else:
                    continue
                break

    def _role(self, index: int, values: Any, users: list[tuple[Any, int]]) -> tuple[Role, str]:
        """Return the role of a constant by the operators that read it; where it stays in float, why."""
        if values.size == 1:
            return "other", "one number of the graph"
        if max(values.shape) == values.size:
            return "other", "a vector: small, and precision matters"
        kinds: set[Role] = set()
        for op, position in users:
            name = self.name_of(op)
            if name in ("FULLY_CONNECTED", "CONV_2D") and position == 1:
                kinds.add("linear")
            elif values.ndim == 2 and self.is_lookup(op, index):
                kinds.add("table")
            elif name.endswith(("SEQUENCE_LSTM", "SEQUENCE_RNN")):
                return "other", f"{name} wants one scale for a matrix, and the grid has one for a row"
            else:
                return "other", f"{name} reads it, which takes floats only"
        return ("table" if "table" in kinds else "linear"), ""


def _reaches(tensor: int, goal: int, made: Mapping[int, Any]) -> bool:
    """Return whether a tensor follows from another."""
    seen, open_ = set(), [tensor]
    while open_:
        at = open_.pop()
        if at == goal:
            return True
        if at in seen or at not in made:
            continue
        seen.add(at)
        open_ += [int(i) for i in made[at].inputs]
    return False


def _dense(found: _Found) -> Dense:
    values = found.values
    if found.role != "other":
        values = values.reshape(values.shape[0], -1)
    tensor = torch.from_numpy(values.copy())
    return Dense(tuple(tensor.shape), torch.float32, lambda: tensor)


def _unused(source: TensorFlowModel, found: Mapping[str, _Found]) -> dict[str, str]:
    """Return the variables that no constant holds as they are."""
    known = {name for one in found.values() for name in one.origins}
    return {
        name: "no constant of the converted graph holds it: merged with others, or of no use to the output"
        for name in source.variables
        if name not in known
    }
