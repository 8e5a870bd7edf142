"""From a profile's steps and the user's options to passes, and the account of what they did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import checkpoint, normal

from slm_export.errors import InputError
from slm_export.optimizers.group_quantize import GroupQuantize, quantize
from slm_export.profile import RecipeStep, shipped_profiles
from slm_export.recipe import (
    QuantizationOptions,
    build_recipe,
    lowest_bits,
    make_pass,
    options_of,
    unaccounted,
)

NOTHING = QuantizationOptions()


def step(name: str = "group-quantize", **options: Any) -> RecipeStep:
    return RecipeStep.model_validate({"pass": name, **options})


def problem(*steps: RecipeStep, options: QuantizationOptions = NOTHING) -> str:
    with pytest.raises(InputError) as caught:
        build_recipe(steps, options, "phone.toml")
    return str(caught.value)


def test_a_profile_without_a_recipe_and_no_options_do_nothing():
    assert build_recipe((), NOTHING, "x") == ()


@pytest.mark.parametrize("profile", shipped_profiles(), ids=lambda profile: profile.name)
def test_every_shipped_recipe_can_be_built(profile):
    recipe = build_recipe(profile.recipe, NOTHING, profile.name)
    assert [made.name for made in recipe] == [made.pass_name for made in profile.recipe]


def test_steps_keep_their_order_and_options():
    steps = (step(bits=8), step(bits=4, group=64, search=False))
    assert build_recipe(steps, NOTHING, "x") == (GroupQuantize(8), GroupQuantize(4, 64, search=False))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (NOTHING, GroupQuantize(4, 64, 8, 16)),
        (QuantizationOptions(bits=4), GroupQuantize(4, 64, 8, 16)),
        (QuantizationOptions(bits=8), GroupQuantize(8, 64, 8)),
        (QuantizationOptions(bits=16), GroupQuantize(16, 64, 16)),
        (QuantizationOptions(bits=32), GroupQuantize(32, 64, 32)),
        (QuantizationOptions(bits=16, embedding_bits=8), GroupQuantize(16, 64, 8)),
        (QuantizationOptions(bits=16, head_bits=4), GroupQuantize(16, 64, 16, 4)),
        (QuantizationOptions(group_size=32), GroupQuantize(4, 32, 8, 16)),
        (QuantizationOptions(embedding_bits=4, head_bits=8), GroupQuantize(4, 64, 4, 8)),
    ],
)
def test_the_users_options_go_over_the_profiles(options, expected):
    steps = (step(bits=4, group=64, embedding_bits=8, head_bits=16),)
    assert build_recipe(steps, options, "x") == (expected,)


def test_options_quantize_even_where_the_profile_does_not():
    assert build_recipe((), QuantizationOptions(bits=8), "x") == (GroupQuantize(8, embedding_bits=8),)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (step("group-quantise"), "unknown pass 'group-quantise'; did you mean 'group-quantize'?"),
        (step(bit=4), "group-quantize: unknown option 'bit'; did you mean 'bits'?"),
        (step(bits="4"), "group-quantize: bits must be a whole number, not '4'"),
        (step(bits=True), "group-quantize: bits must be a whole number, not True"),
        (step(bits=4.0), "group-quantize: bits must be a whole number, not 4.0"),
        (step(search=1), "group-quantize: search must be true or false, not 1"),
        (step(bits=None), "group-quantize: bits must be a whole number, not None"),
        (step(group=48), "group-quantize: group must be one of"),
        (step(bits=3), "group-quantize: bits must be 4, 8, 16 or 32, not 3"),
    ],
)
def test_mistakes_are_refused_with_their_place(wrong, expected):
    assert problem(wrong).startswith(f"phone.toml: {expected}")


def test_options_of_a_pass_make_the_same_pass_again():
    made = GroupQuantize(8, 64, 16, 4, search=False)
    assert make_pass(made.name, options_of(made), "manifest.json") == made
    assert make_pass(made.name, options_of(GroupQuantize()), "manifest.json") == GroupQuantize()


# --- the account -------------------------------------------------------------------------------------


def test_the_lowest_bits_are_those_of_matrices():
    weights = {"w": normal(4, 64), "norm": normal(64).to(torch.float16)}
    assert lowest_bits(checkpoint(weights)) == 32
    assert lowest_bits(checkpoint({**weights, "half": normal(4, 64).to(torch.bfloat16)})) == 16
    assert lowest_bits(checkpoint({**weights, "q": quantize(normal(4, 64), 4, 32)})) == 4
    assert lowest_bits(checkpoint({})) == 32


def test_what_was_neither_changed_nor_skipped_is_found():
    before = checkpoint({"a": normal(2, 32), "b": normal(2, 32), "c": normal(2, 32)})
    after = before.with_weights({"a": quantize(normal(2, 32), 4, 32)})
    assert unaccounted(before, after, {"b": "why", "c": "why"}) == []
    assert unaccounted(before, after, {"b": "why"}) == ["c"]
    assert unaccounted(before, after, {"a": "why", "b": "why", "c": "why"}) == ["a"]
