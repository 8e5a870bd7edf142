"""The ONNX graph of three layers -> that of all.

    head   what comes before the attention of layer 0
    unit   from there to the attention of layer 1, and again from there to that of layer 2
    tail   the rest

The two units must be the same but for the layer that they belong to; what one hands to the next is where they
differ. So all layers are ``head, unit, unit, ..., tail``. Whatever is not as expected is `CannotStamp`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slm_export.graph.layers import CannotStamp, Layers

TRACED = 3
"""Layers that are traced."""

_PAST = re.compile(r"(past_key_values\.)(\d+)(\.(?:key|value))")

Place = tuple[int, int]
"""A node by its offset in the unit, and an output of it."""


def stamp(graph: Any, past: list[Any], layers: Layers) -> None:
    """Change a graph of three layers into one of ``layers.count``.

    Given   graph: matrices and vectors are inputs by their names in the file, and the graph ends with the keys and
            values of every layer
            past: the inputs that are keys and values, in the order of the layers; more are added
    """
    _Stamp(graph, past, layers).run()


class _Stamp:
    def __init__(self, graph: Any, past: list[Any], layers: Layers) -> None:
        self._graph, self._past, self._layers = graph, past, layers
        self._more = layers.count - TRACED
        for index, value in enumerate(past):
            value.name = f"past_key_values.{index // 2}.{('key', 'value')[index % 2]}"
        self._inputs = {value.name: value for value in graph.inputs}
        self._nodes = self._of_layers()
        self._start, self._length = self._find_units()
        self._places = self._positions()

    def run(self) -> None:
        """Put the copies in, and let the tail follow the last of them."""
        import onnx_ir as ir

        first, second = self._unit(0), self._unit(1)
        plan = [self._sources(one, two) for one, two in zip(first, second, strict=True)]
        previous = {(k, o): value for k, node in enumerate(second) for o, value in enumerate(node.outputs)}
        ended, copies, presents = dict(previous), [], []
        for shift in range(1, self._more + 1):
            made: dict[Place, Any] = {}
            for k, node in enumerate(second):
                inputs = [self._resolved(source, previous, made, shift) for source in plan[k]]
                copied = ir.Node(
                    node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs)
                )
                for output, like in zip(copied.outputs, node.outputs, strict=True):
                    output.type, output.shape = like.type, like.shape
                made |= {(k, o): value for o, value in enumerate(copied.outputs)}
                copies.append(copied)
            presents += list(copies[-self._length].outputs[1:])
            previous = made
        tail = self._nodes[self._start + 2 * self._length :]
        self._graph.insert_before(tail[0], copies)
        self._follow(tail, {id(value): previous[place] for place, value in ended.items()})
        # The logits, then keys and values in the order of the layers.
        self._graph.outputs[1 + 2 * (TRACED - 1) : 1 + 2 * (TRACED - 1)] = presents
        self._past.sort(key=_layer_of_past)

    def _of_layers(self) -> list[Any]:
        """Return the nodes that a layer's own inputs lead to. Others, masks and angles, are shared by all layers."""
        layered = {id(value) for name, value in self._inputs.items() if self._shifted(name, 1) != name}
        found = []
        for node in self._graph:
            if any(id(value) in layered for value in node.inputs):
                layered.update(map(id, node.outputs))
                found.append(node)
        return found

    def _find_units(self) -> tuple[int, int]:
        """Return where the first unit begins, and its length."""
        at = [index for index, node in enumerate(self._nodes) if node.op_type == "GroupQueryAttention"]
        if len(at) != TRACED or at[1] - at[0] != at[2] - at[1]:
            raise CannotStamp(f"attention is at {at} of {len(self._nodes)} nodes")
        return at[0], at[1] - at[0]

    def _unit(self, number: int) -> list[Any]:
        begin = self._start + number * self._length
        return self._nodes[begin : begin + self._length]

    def _positions(self) -> Mapping[int, tuple[int, int]]:
        """Return where every value of a layer is made: index of the node among them, and output."""
        return {
            id(value): (index, output)
            for index, node in enumerate(self._nodes)
            for output, value in enumerate(node.outputs)
        }

    def _sources(self, one: Any, two: Any) -> list[tuple[str, Any]]:
        """Return where a node of the unit gets its inputs, by comparing the two units."""
        if (
            (one.domain, one.op_type, len(one.inputs), len(one.outputs))
            != (two.domain, two.op_type, len(two.inputs), len(two.outputs))
        ) or _attributes(one) != _attributes(two):
            raise CannotStamp(
                f"{two.op_type} of layer 1 is where layer 0 has {one.op_type}, or has other attributes"
            )
        return [self._source(a, b) for a, b in zip(one.inputs, two.inputs, strict=True)]

    def _source(self, one: Any, two: Any) -> tuple[str, Any]:
        first, second = self._start, self._start + self._length
        if one is two:
            return "shared", two
        if one is not None and two is not None:
            before, at = self._places.get(id(one)), self._places.get(id(two))
            if at is None:
                if before is None and self._inputs.get(self._shifted(one.name, 1)) is two:
                    return "layered", two
            elif at[0] >= second:
                if before == (at[0] - self._length, at[1]):
                    return "own", (at[0] - second, at[1])
            # What layer 0 takes from before the units may be the embedding, which is no layer's.
            elif at[0] >= first and (before is None or before[0] < first) and _alike(one, two):
                return "carried", (at[0] - first, at[1])
        raise CannotStamp(f"layer 1 takes {_name(two)} where layer 0 takes {_name(one)}")

    def _resolved(
        self, source: tuple[str, Any], previous: Mapping[Place, Any], made: Mapping[Place, Any], shift: int
    ) -> Any:
        kind, what = source
        if kind == "own":
            return made[what]
        if kind == "carried":
            return previous[what]
        return self._input(what, shift) if kind == "layered" else what

    def _follow(self, tail: list[Any], moved: Mapping[int, Any]) -> None:
        """Let the last nodes take what the last layer has."""
        for node in tail:
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                if id(value) in moved:
                    node.replace_input_with(index, moved[id(value)])
                elif self._inputs.get(value.name) is value:
                    node.replace_input_with(index, self._input(value, self._more))

    def _input(self, like: Any, shift: int) -> Any:
        """Return an input of a later layer, made where it is asked for first."""
        import onnx_ir as ir

        name = self._shifted(like.name, shift)
        if name not in self._inputs:
            made = ir.Value(name=name, shape=like.shape, type=like.type)
            self._inputs[name] = made
            self._graph.inputs.append(made)
            if _PAST.fullmatch(name):
                self._past.append(made)
        return self._inputs[name]

    def _shifted(self, name: str, by: int) -> str:
        """Return the name of a later layer; a name of no layer as it is."""
        if match := _PAST.fullmatch(name):
            return f"{match[1]}{int(match[2]) + by}{match[3]}"
        match = re.match(rf"({re.escape(self._layers.prefix)}\.)(\d+)(\..+)", name)
        return f"{match[1]}{int(match[2]) + by}{match[3]}" if match else name


def _layer_of_past(value: Any) -> tuple[int, str]:
    match = _PAST.fullmatch(value.name)
    assert match
    return int(match[2]), match[3]


def _attributes(node: Any) -> dict[str, Any]:
    return {name: str(attribute.value) for name, attribute in node.attributes.items()}


def _alike(one: Any, two: Any) -> bool:
    return bool(one.type == two.type and one.shape == two.shape)


def _name(value: Any) -> str:
    return "nothing" if value is None else str(value.name)
