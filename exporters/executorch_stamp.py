"""The lowered program of two layers -> that of all.

    head   the embedding and layer 0, up to and with its attention
    unit   from there to the attention of layer 1: the rest of layer 0, the beginning of layer 1    N - 1 times
    tail   the rest of layer 1, the last norm and the vocabulary, as of layer N - 1

Every partition lies in one part, since none reaches across an attention, so the result is the program that
lowering all N layers would give. XNNPACK refers to a constant by the sha256 of its bytes. The two layers have
random stand-ins for weights, so each name in a payload tells which weight it stands for, and is overwritten by
the name of that layer's own. A payload with a constant that cannot be told so is never copied: `CannotStamp`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.executorch_file import Contents
from slm_export.exporters.executorch_stand_in import constant, keys_of
from slm_export.graph.layers import CannotStamp, Layers
from slm_export.weights import Weight

_HEAD, _UNIT, _TAIL = range(3)


def stamped(
    two: ExportedProgram,
    layers: Layers,
    checkpoint: Checkpoint,
    substitute: Checkpoint,
    tensors: Mapping[str, Tensor],
) -> tuple[ExportedProgram, Contents]:
    """Return the edge program of ``layers.count`` layers, and the weights that its constants stand for.

    Given   two: the edge program of two layers, lowered with the weights of ``substitute``
            tensors: vectors and caches of the module of all layers, by name
    """
    stamp = _Stamp(two, layers, checkpoint, substitute, tensors)
    return stamp.program(), stamp.contents


def lowered_modules(program: ExportedProgram) -> Iterator[tuple[str, Any]]:
    """Yield name and module of every lowered partition."""
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    for name, child in program.graph_module.named_children():
        if isinstance(child, LoweredBackendModule):
            yield name, child


class _Stamp:
    """One use: ``_Stamp(...).program()``. A node of layer k stands for layer k + shift in a copy of its part."""

    def __init__(
        self,
        two: ExportedProgram,
        layers: Layers,
        checkpoint: Checkpoint,
        substitute: Checkpoint,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._two, self._layers, self._checkpoint, self._tensors = two, layers, checkpoint, tensors
        self._attentions = [n for n in two.graph.nodes if _is(n, "llama.custom_sdpa.default")]
        if len(self._attentions) != 2:
            raise CannotStamp(f"two layers attend {len(self._attentions)} times")
        self._part = self._cut()
        self._origin = {
            key: (index, rest, piece)
            for index in range(2)
            for rest in layers.rests
            for piece, key in enumerate(keys_of(layers.weight(substitute, index, rest)))
        }
        for _, lowered in lowered_modules(two):
            # Shapes are computed by running it, once per copy: let it be built once.
            lowered.original_module.module = functools.cache(lowered.original_module.module)
        self._carried = self._carry()
        self._common = self._constants_in(_HEAD) | self._constants_in(_TAIL)
        self._graph, self._root = fx.Graph(), nn.Module()
        self._state: dict[str, Tensor] = {}
        self._placeholders: dict[str, fx.Node] = {}
        self._inputs: list[InputSpec] = []
        self.contents: dict[str, Callable[[], bytes]] = {}

    def program(self) -> ExportedProgram:
        """Return the program of all layers."""
        self._make_placeholders()
        known = self._copy(_HEAD, 0, {})
        copies = [(_HEAD, 0, known)]
        for shift in range(self._layers.count - 1):
            made = self._copy(_UNIT, shift, known)
            copies.append((_UNIT, shift, made))
            known = {**known, **{earlier: made[later] for later, earlier in self._carried.items()}}
        last = self._layers.count - 2
        copies.append((_TAIL, last, self._copy(_TAIL, last, {**known, **made})))
        outputs = self._make_outputs(copies)
        return ExportedProgram(
            root=fx.GraphModule(self._root, self._graph),
            graph=self._graph,
            graph_signature=ExportGraphSignature(self._inputs, outputs),
            state_dict=self._state,
            range_constraints=self._two.range_constraints,
            module_call_graph=self._two.module_call_graph,
            constants=self._two.constants,
            verifiers=[self._two.verifier],
        )

    def _cut(self) -> dict[fx.Node, int]:
        """Return the part of every operation: how many attentions come before it."""
        part: dict[fx.Node, int] = {}
        for node in self._two.graph.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            inputs = [n for n in node.all_input_nodes if n in part]
            part[node] = max((part[n] + (n in self._attentions) for n in inputs), default=_HEAD)
        for node in self._two.graph.nodes:
            if node.op == "get_attr":
                (user,) = node.users
                part[node] = part[user]
        return part

    def _carry(self) -> dict[fx.Node, fx.Node]:
        """Return what one layer hands to the next: node of the unit -> the node of the head in its place.

        Both are found as arguments of the operations that follow the two attentions, at the same positions.
        """
        earlier, later = self._attentions
        pairs, waiting = {later: earlier}, [(earlier, later)]
        while waiting:
            earlier, later = waiting.pop()
            for one in [n for n in earlier.users if self._part.get(n) == _UNIT]:
                for two in [n for n in later.users if self._part.get(n) == _TAIL]:
                    if one.target != two.target or one.args.index(earlier) != two.args.index(later):
                        continue
                    if one.target is operator.getitem and one.args[1] != two.args[1]:
                        continue
                    for first, second in zip(one.args, two.args, strict=False):
                        if (
                            isinstance(second, fx.Node)
                            and self._part.get(second) == _UNIT
                            and second.op != "get_attr"
                        ):
                            pairs[second] = cast(fx.Node, first)
                    if not _is(one, "executorch_call_delegate") or self._shape(one) == self._shape(two):
                        waiting.append((one, two))
        for node, used in ((n, u) for n in self._two.graph.nodes for u in n.all_input_nodes):
            if self._part.get(node) == _TAIL and self._part.get(used) == _UNIT and used not in pairs:
                raise CannotStamp(f"{used} of layer 0 has no equal that layer 0 receives")
        for second, first in pairs.items():
            if self._part.get(first) != _HEAD or _form(first) != _form(second):
                raise CannotStamp(f"{second} does not take the place of {first}")
        return pairs

    def _shape(self, call: fx.Node) -> tuple[Any, ...]:
        """Return what a partition computes, its weights called by their places in a layer."""
        lowered = self._lowered(call.args[0])
        nodes = list(lowered.original_module.graph.nodes)
        steps = [
            (n.op, n.op == "call_function" and n.target, [nodes.index(i) for i in n.all_input_nodes])
            for n in nodes
        ]
        return steps, [
            self._origin.get(key, (0, key))[1:] for key in lowered.named_data_store_output.pte_data
        ]

    def _constants_in(self, part: int) -> set[str]:
        nodes = [n for n in self._two.graph.nodes if n.op == "get_attr" and self._part[n] == part]
        return {key for n in nodes for key in self._lowered(n).named_data_store_output.pte_data}

    def _lowered(self, node: Any) -> Any:
        return getattr(self._two.graph_module, str(node.target))

    def _shifts(self, part: int) -> range:
        last = self._layers.count - 1
        return {_HEAD: range(1), _UNIT: range(last), _TAIL: range(last - 1, last)}[part]

    def _make_placeholders(self) -> None:
        """Make the inputs: constants and caches of every layer that a part uses, then what the user gives."""
        nodes = {node.name: node for node in self._two.graph.nodes if node.op == "placeholder"}
        made: list[tuple[InputSpec, fx.Node, str]] = []
        for spec in self._two.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            for name in self._names(spec.target, node) if spec.target else [node.name]:
                made.append((spec, node, name))
        order = [kind for kind in InputKind if kind != InputKind.USER_INPUT] + [InputKind.USER_INPUT]
        for spec, node, name in sorted(made, key=lambda item: order.index(item[0].kind)):
            if name in self._placeholders:
                continue
            prefix = "" if self._layers.split(spec.target) is None else "layer_"
            new = self._graph.placeholder(prefix + (name.replace(".", "_") if prefix else node.name))
            new.target, new.meta = new.name, dict(node.meta)
            self._placeholders[name] = new
            self._inputs.append(replace(spec, arg=TensorArgument(new.name), target=spec.target and name))
            if spec.target is not None and name not in self._two.constants:
                self._state[name] = self._value(spec.target, name)

    def _names(self, target: str, node: fx.Node) -> list[str]:
        if (place := self._layers.split(target)) is None:
            return [target]
        parts = sorted({self._part[user] for user in node.users if user in self._part})
        wrong = {_HEAD: 1, _TAIL: 0}
        if any(wrong.get(part) == place[0] for part in parts):
            raise CannotStamp(f"{target} is used where layer {place[0]} is not")
        return [self._name(place, shift) for part in parts for shift in self._shifts(part)]

    def _name(self, place: tuple[int, str], shift: int) -> str:
        return f"{self._layers.path}.{place[0] + shift}.{place[1]}"

    def _value(self, target: str, name: str) -> Tensor:
        place = self._layers.split(target)
        if place is None:
            return cast(Tensor, self._two.state_dict[target])
        tensor = self._tensors.get(name)
        if tensor is None or 0 in tensor.stride():
            raise CannotStamp(f"{name} is made of a matrix, and not in a partition")
        return tensor

    def _copy(self, part: int, shift: int, known: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Append a copy of a part; return its nodes, old -> new."""
        made: dict[fx.Node, fx.Node] = {}

        def argument(node: fx.Node) -> fx.Node:
            if node.op == "placeholder":
                return self._placeholder(node, shift)
            return made[node] if node in made else known[node]

        for node in self._two.graph.nodes:
            if self._part.get(node) != part:
                continue
            new = made[node] = self._graph.node_copy(node, argument)
            if node.op == "get_attr":
                new.target = f"lowered_module_{len(list(self._root.children()))}"
                self._root.add_module(new.target, self._shifted(node, shift))
        return made

    def _placeholder(self, node: fx.Node, shift: int) -> fx.Node:
        target = self._targets.get(node.name)
        place = self._layers.split(target)
        return self._placeholders[self._name(place, shift) if place else target or node.name]

    @functools.cached_property
    def _targets(self) -> dict[str, str | None]:
        return {spec.arg.name: spec.target for spec in self._two.graph_signature.input_specs}

    def _shifted(self, node: fx.Node, shift: int) -> nn.Module:
        """Return a lowered partition with the constants of the layers it now stands for."""
        from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
        from executorch.exir.lowered_backend_module import LoweredBackendModule

        old = self._lowered(node)
        payload, entries = old.processed_bytes, {}
        buffers: list[bytes] = []
        ready: dict[tuple[int, str], Sequence[str]] = {}
        for key, entry in old.named_data_store_output.pte_data.items():
            if (origin := self._origin.get(key)) is not None:
                index, rest, piece = origin
                if (index, rest) not in ready:
                    weight = self._layers.weight(self._checkpoint, index + shift, rest)
                    ready[index, rest] = self._keep(weight)
                name = ready[index, rest][piece]
                data = name.encode()  # the weight itself is written when the file is
                payload = _renamed(payload, key, name)
            elif self._part[node] == _UNIT and key not in self._common:
                raise CannotStamp(f"{node} holds a constant of one layer that is none of its weights")
            else:
                name, data = key, old.named_data_store_output.buffers[entry.buffer_index]
            entries[name] = replace(entry, buffer_index=len(buffers))
            buffers.append(data)
        store = NamedDataStoreOutput(buffers, entries, {})
        new = LoweredBackendModule(old.original_module, old.backend_id, payload, old.compile_specs, store)
        new.meta = old.meta
        return cast(nn.Module, new)

    def _keep(self, weight: Weight) -> Sequence[str]:
        """Remember how to make the constants of a weight; return their names."""

        def piece(index: int) -> Callable[[], bytes]:
            return lambda: constant(weight, index)

        names = keys_of(weight)
        self.contents.update({name: piece(index) for index, name in enumerate(names)})
        return names

    def _make_outputs(self, copies: list[tuple[int, int, dict[fx.Node, fx.Node]]]) -> list[OutputSpec]:
        """Return the outputs: first the caches that were written, then what the user gets."""
        output = self._two.graph.output_node()
        pairs = list(zip(self._two.graph_signature.output_specs, cast(Any, output.args[0]), strict=True))
        specs, values = [], []
        for written in (True, False):
            for part, shift, made in copies:
                for spec, node in pairs:
                    if self._part[node] != part or (spec.kind == OutputKind.BUFFER_MUTATION) != written:
                        continue
                    place = self._layers.split(spec.target)
                    target = self._name(place, shift) if place else spec.target
                    specs.append(replace(spec, arg=TensorArgument(made[node].name), target=target))
                    values.append(made[node])
        self._graph.output(tuple(values)).meta = {"val": tuple(value.meta["val"] for value in values)}
        return specs


def _is(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", str(node.target)) == name


def _form(node: fx.Node) -> tuple[str, torch.dtype]:
    value = node.meta["val"]
    return str(tuple(value.shape)), value.dtype


def _renamed(payload: bytes, old: str, new: str) -> bytes:
    if payload.count(old.encode()) == 0 or len(old) != len(new):
        raise CannotStamp("XNNPACK's payload does not name its constants as it used to")
    return payload.replace(old.encode(), new.encode())
