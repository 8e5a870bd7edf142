"""States are read and updated without copies, and no program can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_programs import operation, package, typed
from torch import Tensor

from slm_export.exporters.mil.evaluator import Evaluator
from slm_export.exporters.mil.package import Package
from slm_export.exporters.mil.plan import Plan
from slm_export.exporters.mil.program import Operation

SHAPE = (4, 4)
TYPE = typed(torch.float32, SHAPE)
STATES = [("a", typed(torch.float32, SHAPE, state=True)), ("b", typed(torch.float32, SHAPE, state=True))]


def sizes(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Literal:
    """Runs the operations as the specification reads: every result is a copy."""

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations

    def run(self, values: dict[str, Tensor]) -> None:
        for each in self._operations:
            given = {key: part[0] for key, part in each.inputs.items()}
            tensors = {
                key: values[part.name] if hasattr(part, "name") else part.tensor()  # type: ignore[union-attr]
                for key, part in given.items()
            }
            if each.kind == "write_state":
                values[given["input"].name] = tensors["data"].clone()  # type: ignore[union-attr]
                continue
            if each.kind == "read_state":
                made = tensors["input"]
            elif each.kind == "coreml_update_state":
                made = tensors["value"]
                values[given["state"].name] = made.clone()  # type: ignore[union-attr]
            elif each.kind == "slice_update":
                made = tensors["x"].clone()
                (r0, c0), (r1, c1) = tensors["begin"].tolist(), tensors["end"].tolist()
                made[r0:r1, c0:c1] = tensors["update"]
            elif each.kind == "transpose":
                made = tensors["x"].T
            elif each.kind == "slice_by_size":
                (r, c), (height, width) = tensors["begin"].tolist(), tensors["size"].tolist()
                made = tensors["x"][r : r + height, c : c + width]
            elif each.kind == "tile":
                made = tensors["x"].repeat(*tensors["reps"].tolist())
            else:
                made = {"identity": lambda x: x, "add": torch.add}[each.kind](*tensors.values())
            values[each.outputs[0][0]] = made.clone()


def draw_program(choose: Any) -> list[Operation]:
    """A program on two states: values are read, viewed, updated, added and written in any order."""
    operations: list[Operation] = []
    names, parts = ["x"], list[str]()
    for number in range(choose(st.integers(2, 14))):
        kind = choose(
            st.sampled_from(["read", "update", "update", "write", "write", "both", "view", "part", "add"])
        )
        name, source = f"v{number}", choose(st.sampled_from(names[-4:]))
        if kind == "read":
            made = operation("read_state", name, TYPE, input=choose(st.sampled_from("ab")))
        elif kind == "write":
            operations.append(
                operation("write_state", None, None, input=choose(st.sampled_from("ab")), data=source)
            )
            continue
        elif kind == "both":
            state = choose(st.sampled_from("ab"))
            made = operation("coreml_update_state", name, TYPE, state=state, value=source)
        elif kind == "view":
            made = choose(
                st.sampled_from(
                    [
                        operation("identity", name, TYPE, x=source),
                        operation("transpose", name, TYPE, x=source, perm=sizes(1, 0)),
                    ]
                )
            )
        elif kind == "part":
            row = typed(torch.float32, (1, 4))
            given = {"begin": sizes(1, 0), "size": sizes(1, 4)}
            operations.append(operation("slice_by_size", f"p{number}", row, x=source, **given))
            parts.append(f"p{number}")
            made = operation("tile", name, TYPE, x=f"p{number}", reps=sizes(4, 1))
        elif kind == "add":
            made = operation("add", name, TYPE, x=source, y=choose(st.sampled_from(names[-4:])))
        else:
            row = choose(st.integers(0, 3))
            update = choose(st.sampled_from([*parts, torch.full((1, 4), float(number))]))
            made = operation(
                "slice_update",
                name,
                TYPE,
                x=source,
                update=update,
                begin=sizes(row, 0),
                end=sizes(row + 1, 4),
            )
        operations.append(made)
        names.append(name)
    return operations


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_program_can_tell(data: Any) -> None:
    operations = draw_program(data.draw)
    made = [each.outputs[0][0] for each in operations if each.outputs and each.outputs[0][1] == TYPE]
    results = data.draw(st.lists(st.sampled_from(["x", *made]), unique=True, max_size=3))
    whole = package(operations, [(name, TYPE) for name in results], [("x", TYPE)], STATES)
    evaluator = Evaluator(whole)
    state = {"a": torch.arange(16.0).view(4, 4), "b": -torch.arange(16.0).view(4, 4)}
    literal = {name: tensor.clone() for name, tensor in state.items()}
    kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for call in range(2):
        x = torch.full(SHAPE, 100.0 + call)
        expected = {**literal, "x": x.clone()}
        Literal(operations).run(expected)
        outputs = evaluator.predict({"x": x}, state)
        assert (x == 100 + call).all()
        for name in ("a", "b"):
            torch.testing.assert_close(state[name], expected[name])
            literal[name] = expected[name].clone()
        kept.append((outputs, {name: expected[name].clone() for name in results}))
        # What left the first call is not touched by the second.
        for were, wanted in kept:
            for name in results:
                torch.testing.assert_close(were[name], wanted[name])


def plan_of(whole: Package) -> Plan:
    return Evaluator(whole)._plan


def extras(plan: Plan) -> list[str]:
    """What the plan decided for each step."""
    return [
        ",".join(key for key in ("copied", "in_place") if key in getattr(step.run, "keywords", {}))
        for step in plan.steps
    ]


def cache_step(read: str, update: str, after: str) -> list[Operation]:
    at = {"begin": sizes(0, 0), "end": sizes(1, 4)}
    return [
        operation("read_state", read, TYPE, input="a"),
        operation("slice_update", update, TYPE, x=read, update="x", **at),
        operation("write_state", None, None, input="a", data=update),
        operation("read_state", after, TYPE, input="a"),
    ]


def test_a_cache_is_updated_where_it_is() -> None:
    row = typed(torch.float32, (1, 4))
    operations = [*cache_step("r", "u", "s"), operation("add", "y", TYPE, x="s", y="s")]
    whole = package(operations, [("y", TYPE)], [("x", row)], STATES)
    assert extras(plan_of(whole)) == ["", "in_place", "", "", ""]
    state = {name: torch.zeros(SHAPE) for name in "ab"}
    address = state["a"].data_ptr()
    Evaluator(whole).predict({"x": torch.ones(1, 4)}, state)
    assert state["a"].data_ptr() == address
    assert state["a"].sum() == 4


@pytest.mark.parametrize("late", ["r", "v"])
def test_what_is_read_before_and_used_after_is_copied(late: str) -> None:
    row = typed(torch.float32, (1, 4))
    operations = cache_step("r", "u", "s")
    operations.insert(1, operation("transpose", "v", TYPE, x="r", perm=sizes(1, 0)))
    operations.append(operation("add", "y", TYPE, x="s", y=late))
    whole = package(operations, [("y", TYPE)], [("x", row)], STATES)
    assert extras(plan_of(whole)) == ["copied", "", "", "", "", ""]
    state = {"a": torch.arange(16.0).view(SHAPE), "b": torch.zeros(SHAPE)}
    before = state["a"].clone()
    made = Evaluator(whole).predict({"x": torch.ones(1, 4)}, state)["y"]
    torch.testing.assert_close(made, state["a"] + (before if late == "r" else before.T))
