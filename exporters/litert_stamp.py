"""The flatbuffer of three layers -> that of all.

    head   what comes before the key cache of layer 0 is written
    unit   from there to the same place of layer 1, and again to that of layer 2
    tail   the rest

The two units must be the same but for the layer that they belong to; what one hands to the next is where they
differ. So all layers are ``head, unit, unit, ..., tail``. Whatever is not as expected is `CannotStamp`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm_export.graph.layers import CannotStamp, Layers

TRACED = 3
"""Layers that are converted."""

_CACHE = re.compile(r"(kv_cache_[kv]_)(\d+)")

Roles = dict[int, str]
"""Tensor of a subgraph -> what it is: a checkpoint's weight, or an input or output of the signature."""


@dataclass(frozen=True)
class _Carried:
    """An input that an operation takes from the unit before its own."""

    offset: int
    """Of the operation that makes it."""
    output: int


@dataclass(frozen=True)
class _Own(_Carried):
    """An input that an operation takes from its own unit."""


@dataclass(frozen=True)
class _Layered:
    """An input of the graph that every layer has its own of."""

    tensor: int


@dataclass(frozen=True)
class _Shared:
    """The same tensor for every layer."""

    tensor: int


_Source = _Carried | _Layered | _Shared


def stamp(model: Any, subgraph: Any, inputs: Roles, outputs: Roles, layers: Layers) -> tuple[Roles, Roles]:
    """Change a subgraph of three layers into one of ``layers.count``; return its inputs and outputs."""
    return _Stamp(model, subgraph, inputs, outputs, layers).run()


def without_dead(subgraph: Any, outputs: Roles) -> None:
    """Drop every operation that no output needs."""
    needed, kept = set(outputs), []
    for op in reversed(subgraph.operators):
        if needed.intersection(map(int, op.outputs)):
            needed.update(map(int, op.inputs))
            kept.append(op)
    subgraph.operators = kept[::-1]


class _Stamp:
    def __init__(self, model: Any, subgraph: Any, inputs: Roles, outputs: Roles, layers: Layers) -> None:
        self._model, self._graph, self._layers = model, subgraph, layers
        self._inputs, self._outputs = inputs, outputs
        self._ops = self._shared_first()
        self._maker = {t: (i, o) for i, op in enumerate(self._ops) for o, t in enumerate(op.outputs)}
        self._start, self._length = self._find_units()
        self._plan = [self._sources(offset) for offset in range(self._length)]
        self._made: Mapping[str, int] = {}

    def run(self) -> tuple[Roles, Roles]:
        """Return inputs and outputs of the subgraph of all layers."""
        start, length, more = self._start, self._length, self._layers.count - TRACED
        tail = start + 2 * length
        head, second = self._ops[: start + length], self._ops[start + length : tail]
        by_name = {name: tensor for tensor, name in self._inputs.items()}
        results = {name: tensor for tensor, name in self._outputs.items()}
        copies: list[Any] = []
        previous = {(j, o): t for j, op in enumerate(second) for o, t in enumerate(op.outputs)}
        # What the tail takes from layer 2 it takes from the last layer, and so do its weights.
        last = dict(previous)
        for shift in range(1, more + 1):
            made: dict[tuple[int, int], int] = {}
            for j, op in enumerate(second):
                copied = copy.copy(op)
                copied.inputs = np.array(
                    [
                        self._resolve(source, previous, made, by_name, shift) if source else -1
                        for source in self._plan[j]
                    ],
                    dtype=np.int32,
                )
                copied.outputs = np.array([self._clone(t) for t in op.outputs], dtype=np.int32)
                made |= {(j, o): t for o, t in enumerate(copied.outputs)}
                copies.append(copied)
            previous = made
        moved = {tensor: previous[key] for key, tensor in last.items()}
        ends = [self._moved(op, moved, by_name, more) for op in self._ops[tail:]]
        self._graph.operators = [*head, *second, *copies, *ends]
        return self._io(by_name, results, moved, second, more)

    def _shared_first(self) -> list[Any]:
        """Return the operations, those before all others that no layer's own inputs lead to: masks, rotations.

        They are made where they are first used, which is in the middle of layer 0.
        """
        layered = {t for t, name in self._inputs.items() if self._layer(name) is not None}
        shared, rest = [], []
        for op in self._graph.operators:
            if layered.intersection(map(int, op.inputs)):
                layered.update(map(int, op.outputs))
                rest.append(op)
            else:
                shared.append(op)
        return [*shared, *rest]

    def _find_units(self) -> tuple[int, int]:
        """Return where the first unit begins, and its length."""
        places = {}
        for tensor, name in self._outputs.items():
            if name.startswith("kv_cache_k_"):
                places[int(name.rpartition("_")[2])] = self._maker[tensor][0]
        at = [places[i] for i in range(TRACED)]
        if at[1] - at[0] != at[2] - at[1] or at[1] <= at[0]:
            raise CannotStamp(f"the layers' caches are written at {at}")
        return at[0], at[1] - at[0]

    def _sources(self, offset: int) -> list[_Source | None]:
        """Return where an operation of the unit gets its inputs, by comparing the two units."""
        one, two = (self._ops[self._start + n * self._length + offset] for n in (0, 1))
        if (
            one.opcodeIndex != two.opcodeIndex
            or _options(one) != _options(two)
            or len(one.inputs) != len(two.inputs)
            or [self._form(t) for t in one.outputs] != [self._form(t) for t in two.outputs]
        ):
            raise CannotStamp(f"operation {offset} of layer 1 differs from that of layer 0")
        return [self._source(int(a), int(b)) for a, b in zip(one.inputs, two.inputs, strict=True)]

    def _source(self, one: int, two: int) -> _Source | None:
        if two < 0:
            return None
        first, second = (self._start + n * self._length for n in (0, 1))
        at, output = self._maker.get(two, (-1, 0))
        before = self._maker.get(one, (-1, 0))
        if at >= second and before == (at - self._length, output):
            return _Own(at - second, output)
        if first <= at < second and 0 <= before[0] < first and self._alike(one, two):
            return _Carried(at - first, output)
        if one == two and at < first:
            return _Shared(two)
        names = self._inputs.get(one), self._inputs.get(two)
        if names[0] and names[1] == self._shifted(names[0], 1):
            return _Layered(two)
        if at < 0 and self._constant(one) is not None and self._constant(one) == self._constant(two):
            return _Shared(two)
        raise CannotStamp(f"layer 1 takes {self._name(two)} where layer 0 takes {self._name(one)}")

    def _resolve(
        self,
        source: _Source,
        previous: Mapping[tuple[int, int], int],
        made: Mapping[tuple[int, int], int],
        by_name: dict[str, int],
        shift: int,
    ) -> int:
        match source:
            case _Own():
                return made[source.offset, source.output]
            case _Carried():
                return previous[source.offset, source.output]
            case _Layered():
                return self._input(self._shifted(self._inputs[source.tensor], shift), source.tensor, by_name)
            case _Shared():
                return source.tensor

    def _moved(self, op: Any, moved: Mapping[int, int], by_name: dict[str, int], more: int) -> Any:
        """Return an operation of the tail as of the last layer."""
        changed = copy.copy(op)
        inputs = []
        for tensor in map(int, op.inputs):
            name = self._inputs.get(tensor)
            inputs.append(
                self._input(self._shifted(name, more), tensor, by_name)
                if name is not None
                else moved.get(tensor, tensor)
            )
        changed.inputs = np.array(inputs, dtype=np.int32)
        return changed

    def _io(
        self,
        by_name: dict[str, int],
        results: Mapping[str, int],
        moved: Mapping[int, int],
        second: list[Any],
        more: int,
    ) -> tuple[Roles, Roles]:
        """Return all inputs and outputs: those there were, and those of the layers in between."""
        outputs = {}
        for name, tensor in results.items():
            if self._layer(name) == TRACED - 1:
                outputs[self._shifted(name, more)] = moved.get(tensor, tensor)
            else:
                outputs[name] = tensor
        operators = self._graph.operators
        for layer in range(TRACED - 1, self._layers.count - 1):
            for name, tensor in results.items():
                if self._layer(name) != 1:
                    continue
                # Where layer 1's is made, counted from the first unit, that of this layer is made so much later.
                at, output = self._maker[tensor]
                outputs[self._shifted(name, layer - 1)] = int(
                    operators[at + (layer - 1) * self._length].outputs[output]
                )
        return {tensor: name for name, tensor in by_name.items()}, {t: n for n, t in outputs.items()}

    def _input(self, name: str, like: int, by_name: dict[str, int]) -> int:
        if name not in by_name:
            by_name[name] = self._clone(like)
        return by_name[name]

    def _clone(self, tensor: int) -> int:
        self._graph.tensors.append(copy.copy(self._graph.tensors[tensor]))
        return len(self._graph.tensors) - 1

    def _shifted(self, name: str, by: int) -> str:
        """Return the name of a later layer; a name of no layer as it is."""
        if match := _CACHE.fullmatch(name):
            return f"{match[1]}{int(match[2]) + by}"
        if (layer := self._layer(name)) is None:
            return name
        prefix = self._layers.prefix
        return f"{prefix}.{layer + by}{name[len(f'{prefix}.{layer}') :]}"

    def _layer(self, name: str) -> int | None:
        if match := _CACHE.fullmatch(name):
            return int(match[2])
        match = re.match(re.escape(self._layers.prefix) + r"\.(\d+)\.", name)
        return int(match[1]) if match else None

    def _form(self, tensor: int) -> tuple[Any, ...]:
        found = self._graph.tensors[tensor]
        return found.type, tuple(found.shape) if found.shape is not None else ()

    def _alike(self, one: int, two: int) -> bool:
        """Whether two tensors hold values of the same form; dimensions of 1 in front change nothing."""
        (kind, shape), (other, its) = self._form(one), self._form(two)
        return kind == other and _stripped(shape) == _stripped(its)

    def _constant(self, tensor: int) -> bytes | None:
        data = self._model.buffers[self._graph.tensors[tensor].buffer].data
        return None if data is None else bytes(data)

    def _name(self, tensor: int) -> str:
        return self._inputs.get(tensor) or f"tensor {tensor}"


def _options(op: Any) -> Any:
    return None if op.builtinOptions is None else {k: str(v) for k, v in vars(op.builtinOptions).items()}


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]
