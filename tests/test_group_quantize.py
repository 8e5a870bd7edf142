"""What group-quantize makes of every kind of weight, and how much it may cost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from checkpoints import checkpoint, dense, group_errors, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.optimizers import group_quantize
from slm_export.optimizers.group_quantize import GroupQuantize, quantize
from slm_export.recipe import unaccounted
from slm_export.source.load import load_checkpoint
from slm_export.weights import CODE_RANGE, SMALLEST_SCALE, Dense, Quantized, grid_scale

KINDS = ((4, 32), (4, 64), (4, 128), (8, 128))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Return (4, 128): normal, heavy-tailed or all alike, some rows zero, of any magnitude."""
    values = normal(4, 128, seed=draw(st.integers(0, 1 << 16)))
    values = values ** draw(st.sampled_from([1, 3, 5, 0]))
    values[draw(st.integers(0, 3))] *= draw(st.sampled_from([0.0, 1.0]))
    return values * 2.0 ** draw(st.integers(-30, 8))


@pytest.mark.parametrize(("bits", "group"), KINDS)
@given(values=matrices())
def test_codes_and_scales_are_on_the_grid(bits, group, values):
    weight = quantize(values, bits, group)
    low, high = CODE_RANGE[bits]
    assert low <= int(weight.codes().min()) <= int(weight.codes().max()) <= high
    assert weight.scales.shape == (4, 128 // group)
    assert torch.equal(weight.scales, grid_scale(weight.scales))
    assert weight.float32().isfinite().all()


@pytest.mark.parametrize(("bits", "group"), KINDS)
@given(values=matrices())
def test_min_max_is_wrong_by_half_a_step_at_most(bits, group, values):
    weight = quantize(values, bits, group, search=False)
    # Rounding a scale to bfloat16 moves the end of the range by 2^-8 of itself: 127 * 2^-8 is under half a step.
    step = weight.scales.double().repeat_interleave(group, dim=1)
    error = (weight.float32().double() - values.double()).abs()
    assert (error <= step / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize(("bits", "group"), KINDS)
@given(values=matrices())
@settings(deadline=None)
def test_the_search_is_never_worse_than_min_max(bits, group, values):
    searched = group_errors(values, quantize(values, bits, group))
    plain = group_errors(values, quantize(values, bits, group, search=False))
    # The search compares float32 sums of at most 128 squares, each relative to the size of the error.
    assert (searched <= plain * (1 + 1e-4)).all()


@pytest.mark.parametrize(("bits", "at_most"), [(4, 0.9), (8, 1.0)])
def test_the_search_is_better_on_heavy_tails(bits, at_most):
    values = normal(256, 128) ** 3
    group = 32 if bits == 4 else 128
    searched = group_errors(values, quantize(values, bits, group)).sum()
    plain = group_errors(values, quantize(values, bits, group, search=False)).sum()
    assert searched < at_most * plain


def test_the_search_is_better_on_a_real_model(pycode):
    weights = load_checkpoint(pycode).weights
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.5.mlp.down_proj.weight"):
        values = weights[name].float32()
        searched = group_errors(values, quantize(values, 4, 32)).sum()
        assert searched < 0.9 * group_errors(values, quantize(values, 4, 32, search=False)).sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_zeros_has_a_valid_scale(bits):
    values = normal(2, 64)
    values[0] = 0
    weight = quantize(values, bits, 32 if bits == 4 else 64)
    assert (weight.scales[0] == SMALLEST_SCALE).all()
    assert not weight.codes()[0].any()


def test_blocks_of_rows_make_no_difference(monkeypatch):
    values = normal(37, 64)
    whole = quantize(values, 4, 32)
    monkeypatch.setattr(group_quantize, "_BLOCK", 5 * 64)
    parts = quantize(values, 4, 32)
    assert torch.equal(whole.packed, parts.packed)
    assert torch.equal(whole.scales, parts.scales)


def test_the_number_of_threads_makes_no_difference(minilm):
    """One sum in another order is enough: it takes another scale, and with it every code of the row."""
    name = "encoder.layer.1.intermediate.dense.weight"
    values = load_checkpoint(minilm).weights[name].float32()
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append(quantize(values, 8, values.shape[1]).load())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_the_source_is_not_written_to():
    values = normal(4, 64)
    before = values.clone()
    for bits in (4, 8, 16):
        GroupQuantize(bits=bits).run(checkpoint({"w": values}))
    assert torch.equal(values, before)


# --- what happens to which weight --------------------------------------------------------------------


def model(*, tied: bool = False, columns: int = 64) -> Checkpoint:
    weights = {
        "embed": normal(50, columns),
        "positions": normal(16, columns, seed=1),
        "linear": normal(8, columns, seed=2),
        "odd": normal(8, 40, seed=3),
        "norm": normal(columns, seed=4),
    }
    roles = {"embed": "embedding", "positions": "table", "linear": "linear", "odd": "linear", "norm": "other"}
    if tied:
        return checkpoint(weights, roles, {"head": "embed"})
    return checkpoint({**weights, "head": normal(50, columns, seed=5)}, {**roles, "head": "head"})


def bits_of(made: Checkpoint) -> dict[str, int]:
    return {
        name: weight.bits if isinstance(weight, Quantized) else 8 * weight.dtype.itemsize
        for name, weight in made.weights.items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_changed_or_skipped_with_a_reason(tied):
    before = model(tied=tied)
    for bits, embedding_bits in itertools.product((4, 8, 16, 32), repeat=2):
        result = GroupQuantize(bits=bits, embedding_bits=embedding_bits).run(before)
        assert unaccounted(before, result.checkpoint, result.skipped) == []
        assert all(result.skipped.values())
        assert "norm" in result.skipped


def test_each_role_has_its_own_bits():
    made = GroupQuantize(bits=4, embedding_bits=8, head_bits=16).run(model()).checkpoint
    assert bits_of(made) == {"embed": 8, "positions": 8, "linear": 4, "odd": 32, "norm": 32, "head": 16}


def test_a_position_table_never_has_4_bits():
    made = GroupQuantize(bits=4, embedding_bits=4).run(model()).checkpoint
    assert bits_of(made)["positions"] == 8
    assert bits_of(made)["embed"] == bits_of(made)["head"] == 4


def test_4_bit_groups_and_8_bit_rows():
    made = GroupQuantize(bits=4, group=64, embedding_bits=8).run(model(columns=128)).checkpoint
    assert made.weights["linear"].scales.shape == (8, 2)
    assert made.weights["embed"].scales.shape == (50, 1)


def test_columns_that_no_group_divides_are_skipped_with_a_reason():
    result = GroupQuantize(bits=4).run(model())
    assert result.skipped["odd"] == "40 columns do not divide by 32, the smallest group"
    assert isinstance(GroupQuantize(bits=8).run(model()).checkpoint.weights["odd"], Quantized)


@pytest.mark.parametrize(
    ("columns", "group", "fitting"), [(96, 64, "32"), (128, 256, "32 or 64 or 128"), (64, 128, "32 or 64")]
)
def test_a_group_that_does_not_divide_is_refused_with_those_that_do(columns, group, fitting):
    with pytest.raises(InputError) as caught:
        GroupQuantize(bits=4, group=group).run(model(columns=columns))
    assert str(caught.value) == (
        f"group size {group} does not divide the {columns} columns of linear; "
        f"a group size that fits this model: {fitting}"
    )


def test_a_tied_pair_stays_one_matrix(pycode):
    before = load_checkpoint(pycode)
    assert before.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    made = GroupQuantize(bits=32, embedding_bits=8, head_bits=8).run(before).checkpoint
    assert made.tied == before.tied
    assert "lm_head.weight" not in made.weights
    assert bits_of(made)["model.embed_tokens.weight"] == 8
    assert made.parameters == before.parameters


def test_a_tied_pair_cannot_have_two_widths():
    with pytest.raises(InputError, match="head bits 4 and embedding bits 8 differ, but this model ties"):
        GroupQuantize(embedding_bits=8, head_bits=4).run(model(tied=True))


def test_16_bits_are_float16():
    made = GroupQuantize(bits=16).run(model()).checkpoint.weights["linear"]
    assert isinstance(made, Dense)
    assert made.dtype == made.load().dtype == torch.float16
    assert torch.equal(made.load(), normal(8, 64, seed=2).to(torch.float16))


def test_values_beyond_float16_are_kept_with_a_reason():
    result = GroupQuantize(bits=16).run(checkpoint({"w": torch.tensor([[1.0, -70000.0]])}))
    assert result.skipped == {"w": "holds 7e+04, beyond the range of float16"}
    # 65519 still rounds to 65504, the largest float16; 65520 would round to infinity.
    result = GroupQuantize(bits=16).run(checkpoint({"w": torch.tensor([[65504.0]])}))
    assert result.checkpoint.weights["w"].load().isfinite().all()


def test_what_is_narrow_already_or_asked_to_stay_is_skipped():
    half, done = dense(normal(8, 64).to(torch.float16)), quantize(normal(8, 64), 8, 64)
    before = checkpoint({"half": half, "done": done})
    result = GroupQuantize(bits=16).run(before)
    assert result.skipped == {"half": "in float16 already", "done": "already quantized"}
    assert GroupQuantize(bits=32).run(before).skipped["half"] == "kept in 32 bits, as asked"


def test_history_and_everything_else_is_shared():
    before = replace(model(), unused={"x": "y"}, history=("a",))
    after = GroupQuantize().run(before).checkpoint
    assert after == replace(before, weights=after.weights)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bits": 5}, "bits must be 4, 8, 16 or 32, not 5"),
        ({"embedding_bits": 0}, "embedding_bits must be 4, 8, 16 or 32, not 0"),
        ({"head_bits": 64}, "head_bits must be 4, 8, 16 or 32, not 64"),
        ({"group": 48}, "group must be one of"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, problem):
    with pytest.raises(InputError, match=f"^group-quantize: {problem}"):
        GroupQuantize(**options)
