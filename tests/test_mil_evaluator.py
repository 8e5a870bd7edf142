"""The evaluator holds inputs, states and results to what the program declares, and keeps its constants to itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from mil_programs import operation, package, typed
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.evaluator import Evaluator
from slm_export.exporters.mil.package import Package

F16, F32, I32 = torch.float16, torch.float32, torch.int32


def plus(kind: str = "add", made: Any = None, name: str = "y", **more: Any) -> Package:
    row = typed(F16, (1, 4))
    operands = {"x": "x", "y": "x"} | more
    return package([operation(kind, name, made or row, **operands)], [("y", made or row)], [("x", row)])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "input 'x' is missing"),
        ({"x": torch.zeros(1, 4)}, "input 'x' is torch.float32; it has to be torch.float16"),
        ({"x": torch.zeros(1, 5).half()}, r"input 'x' has the shape \[1, 5\]; it has to be \[1, 4\]"),
        ({"x": torch.zeros(4).half()}, r"input 'x' has the shape \[4\]"),
        ({"x": torch.zeros(1, 4).half(), "z": torch.zeros(1)}, "has no input 'z'"),
    ],
)
def test_inputs_are_held_to_their_description(given: dict[str, Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Evaluator(plus()).predict(given)


def test_a_state_is_held_to_its_description() -> None:
    pair = typed(F16, (2,))
    operations = [operation("read_state", "y", pair, input="s")]
    read = package(operations, [("y", pair)], (), [("s", typed(F16, (2,), state=True))])
    evaluator = Evaluator(read)
    assert evaluator.make_state()["s"].tolist() == [0, 0]
    for wrong, words in (
        ({}, "is missing"),
        ({"s": torch.zeros(2)}, "float32"),
        ({"s": torch.zeros(3).half()}, "shape"),
    ):
        with pytest.raises(InputError, match=f"state 's'.*{words}"):
            evaluator.predict({}, wrong)
    held = evaluator.make_state()
    made = evaluator.predict({}, held)["y"]
    held["s"].fill_(7)
    assert made.tolist() == [0, 0]


@pytest.mark.parametrize(
    "made", [typed(F32, (1, 4)), typed(F16, (1, 3)), typed(F16, (4,)), typed(F16, (None, 3)), typed(F16, ())]
)
def test_a_result_of_another_type_is_the_converter_s_fault(made: Any) -> None:
    with pytest.raises(
        InputError, match=r"add 'y': 'y' is declared .*, but is torch.float16 \[1, 4\]; the conversion"
    ):
        Evaluator(plus(made=made)).predict({"x": torch.zeros(1, 4).half()})


def test_a_dimension_that_is_not_known_may_be_any() -> None:
    made = Evaluator(plus(made=typed(F16, (None, 4)))).predict({"x": torch.ones(1, 4).half()})
    assert made["y"].tolist() == [[2, 2, 2, 2]]


def test_unknown_operators_are_all_named_before_anything_runs() -> None:
    row = typed(F16, (1, 4))
    kinds = ["frobnicate", "add", "twist", "frobnicate"]
    operations = [operation(kind, f"v{i}", row, x="x", y="x") for i, kind in enumerate(kinds)]
    with pytest.raises(InputError) as error:
        Evaluator(package(operations, [("v3", row)], [("x", row)]))
    for words in ("frobnicate (2: frobnicate 'v0', frobnicate 'v3')", "twist (1: twist 'v2')", "iOS 18"):
        assert words in str(error.value)
    with pytest.raises(InputError, match=r"iOS 17: slice_update"):
        Evaluator(package([operation("slice_update", "v", row, x="x")], [("v", row)], [("x", row)], opset=17))


def test_what_goes_wrong_names_the_operation() -> None:
    with pytest.raises(InputError, match=r"matmul 'y': .*\(given \{'x': \[1, 4\], 'y': \[1, 4\]\}\)"):
        Evaluator(plus("matmul")).predict({"x": torch.zeros(1, 4).half()})
    row = typed(F16, (1, 4))
    one = operation("identity", "y", row, x="x")
    two = replace(one, outputs=(("y", row), ("z", row)))
    evaluator = Evaluator(package([two], [("y", row)], [("x", row)]))
    with pytest.raises(InputError, match="makes 1 values, declared are 2"):
        evaluator.predict({"x": torch.zeros(1, 4).half()})


def test_constants_and_inputs_may_be_results_and_stay_ours() -> None:
    row, constant = typed(F16, (1, 4)), torch.arange(4).half().view(1, 4)
    operations = [operation("const", "c", row, val=constant), operation("identity", "i", row, x="x")]
    evaluator = Evaluator(package(operations, [("c", row), ("i", row), ("x", row)], [("x", row)]))
    x = torch.ones(1, 4).half()
    for _ in range(2):
        made = evaluator.predict({"x": x})
        torch.testing.assert_close(made["c"], constant)
        torch.testing.assert_close(made["i"], torch.ones(1, 4).half())
        for value in made.values():
            value.fill_(math.nan)
    assert x.sum() == 4


def test_large_matrices_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from slm_export.exporters.mil.operators import constant

    monkeypatch.setattr(constant, "_BLOCK", 64)
    weight, table = torch.randn(10, 16).half(), torch.randn(10, 16).half()
    row = typed(F16, (3, 16))
    operations = [
        operation("gather", "g", row, x=table, indices="ids", axis=torch.tensor(0, dtype=I32)),
        operation("linear", "l", typed(F16, (3, 10)), x="g", weight=weight, bias=torch.ones(10).half()),
        operation("matmul", "y", typed(F16, (3, 16)), x="l", y=weight),
        operation("matmul", "z", typed(F16, (3, 10)), x="g", y=weight, transpose_y=torch.tensor(True)),
    ]
    results = [("y", row), ("z", typed(F16, (3, 10)))]
    ids = torch.tensor([3, 0, 9], dtype=I32)
    made = []
    for budget in (0, 1 << 20):
        monkeypatch.setattr(Evaluator, "READY_BYTES", budget)
        whole = package(operations, results, [("ids", typed(I32, (3,)))])
        made.append(Evaluator(whole).predict({"ids": ids}))
        kept = [c for made, _ in whole.prepared["pool"]._made.values() for c in made if c._ready is not None]
        assert bool(kept) == bool(budget)
    chosen = table[ids.long()].float()
    inner = (chosen @ weight.float().T + 1).half()
    for each in made:
        torch.testing.assert_close(each["y"], (inner.float() @ weight.float()).half(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(each["z"], (chosen @ weight.float().T).half(), rtol=2e-3, atol=2e-3)
