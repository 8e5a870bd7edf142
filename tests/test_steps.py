"""A block that a pass spoils is seen, whatever the rest of its matrix is like."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from checkpoints import checkpoint, normal
from torch import Tensor

from slm_export.fidelity import default_gates
from slm_export.fidelity.steps import StepErrors, judge_steps, steps_of, worst_of
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.reports.by_weight import changes_of
from slm_export.weights import Quantized, quantized

GATES = default_gates("text-generation", 4)
NAME = "model.layers.1.mlp.down_proj.weight"


def of_grid(codes: Tensor, scales: Tensor, errors: Tensor) -> StepErrors:
    weight = quantized(codes.to(torch.int8), scales, 4)
    return steps_of(NAME, weight, errors.split(2))


def test_figures_are_in_steps_of_each_group() -> None:
    scales = torch.tensor([[0.5, 0.25], [0.5, 0.125], [1.0, 1.0], [0.5, 0.5]])
    errors = torch.zeros(4, 128)
    errors[1, 64:96] = 0.25  # two steps of its group
    errors[2, :64] = -0.5
    found = of_grid(torch.zeros(4, 128), scales, errors)
    assert found.rounding_steps == pytest.approx(2)
    assert found.furthest == f"{NAME}, row 1, columns 64 to 95"
    assert found.rounding_bias == pytest.approx(abs(32 * 2 - 64 * 0.5) / 512)
    assert found.most_biased == NAME


def test_what_is_no_number_is_the_furthest_of_all() -> None:
    errors = torch.zeros(4, 64)
    errors[1, 40] = math.nan
    errors[3, 40] = 3.0
    found = of_grid(torch.zeros(4, 64), torch.ones(4, 1), errors)
    assert math.isnan(found.rounding_steps)
    assert found.furthest.endswith("row 1, columns 32 to 63")
    assert not all(check.passed for check in judge_steps(found, GATES))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_alone_stays_far_within_the_bounds(bits: int) -> None:
    before = checkpoint({"a": normal(96, 512), "b": normal(40, 96) ** 3, "zero": torch.zeros(4, 64)})
    steps = changes_of(before, GroupQuantize(bits=bits, group=32).run(before).checkpoint).steps
    assert steps is not None
    assert 0.2 < steps.rounding_steps < 1
    assert steps.rounding_bias < 0.05
    assert all(check.passed for check in judge_steps(steps, GATES))


def _zero(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    codes[5, 32:64] = 0
    return codes, scales


@pytest.mark.parametrize(
    ("spoil", "figure"),
    [
        (_zero, "rounding_steps"),
        (lambda codes, scales: (codes.flip(1), scales), "rounding_steps"),
        (lambda codes, scales: (codes, scales.roll(1, 1) * 4), "rounding_steps"),
        (lambda codes, scales: ((codes + 1).clamp(-8, 7), scales), "rounding_bias"),
    ],
    ids=["a group of zeros", "columns backwards", "scales of others", "another zero point"],
)
def test_a_spoilt_block_fails_and_is_named(
    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], figure: str
) -> None:
    before = checkpoint({NAME: normal(96, 512), "good": normal(96, 512)})
    good = GroupQuantize(bits=4, group=32).run(before).checkpoint
    weight = good.weights[NAME]
    assert isinstance(weight, Quantized)
    codes, scales = spoil(weight.codes(), weight.scales.clone())
    steps = changes_of(before, good.with_weights({NAME: quantized(codes, scales, 4)})).steps
    failed = {check.name: check.detail for check in judge_steps(steps, GATES) if not check.passed}
    assert NAME in failed[figure]


def test_nothing_on_the_grid_is_nothing_to_judge() -> None:
    before = checkpoint({"a": normal(4, 32)})
    assert changes_of(before, before).steps is None
    assert judge_steps(None, GATES) == ()
    assert worst_of((None, None)) is None


def test_the_worst_of_several_passes_stays() -> None:
    one, other = StepErrors(0.3, 0.2, "a", "b"), StepErrors(0.5, 0.1, "c", "d")
    assert worst_of((one, None, other)) == StepErrors(0.5, 0.2, "c", "b")
    unknown = StepErrors(math.nan, math.nan, "e", "f")
    assert [worst_of(each).furthest for each in ((one, unknown), (unknown, one))] == ["e", "e"]  # type: ignore[union-attr]
