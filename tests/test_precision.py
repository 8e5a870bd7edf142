"""Bits and groups of single matrices, by name."""

from __future__ import annotations

import json

import pytest
from checkpoints import checkpoint, normal

from slm_export.compression.precision import chosen
from slm_export.errors import InputError
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.profile import RecipeStep
from slm_export.recipe import QuantizationOptions, build_recipe, make_pass, options_of


def model(**more):
    names = ("layers.0.up.weight", "layers.0.down.weight", "layers.1.up.weight", "layers.1.down.weight")
    weights = {name: normal(8, 128, seed=seed) for seed, name in enumerate(names)}
    return checkpoint({**weights, "embed.weight": normal(16, 128), "norm.weight": normal(128)}, **more)


def precisions(made):
    return {
        name: (getattr(weight, "bits", 0), getattr(weight, "group", 0))
        for name, weight in made.run(model(roles={"embed.weight": "embedding"})).checkpoint.weights.items()
    }


def test_a_full_name_goes_before_patterns_and_the_last_pattern_counts():
    table = {"a.b": 1, "a.*": 2, "*.b": 3}
    assert [chosen(table, name) for name in ("a.b", "a.c", "c.b", "c.d")] == [1, 2, 3, None]


def test_tables_speak_for_the_matrices_that_they_name():
    made = GroupQuantize(
        bits_by_tensor={"*.down.weight": 8, "embed.weight": 4}, group_by_tensor={"layers.1.*": 128}
    )
    assert precisions(made) == {
        "layers.0.up.weight": (4, 32),
        "layers.0.down.weight": (8, 128),
        "layers.1.up.weight": (4, 128),
        "layers.1.down.weight": (8, 128),
        "embed.weight": (4, 32),
        "norm.weight": (0, 0),
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits_by_tensor": {"a": 5}}, "bits_by_tensor: 'a' must be 4, 8, 16 or 32, not 5"),
        ({"bits_by_tensor": {"a": True}}, "bits_by_tensor: 'a' must be 4, 8, 16 or 32, not True"),
        ({"group_by_tensor": {"a": 48}}, "group_by_tensor: 'a' must be 32, 64, 128 or 256, not 48"),
        ({"bits_by_tensor": 8}, "bits_by_tensor must be a table of names and whole numbers, not 8"),
    ],
)
def test_values_that_no_matrix_can_have_are_refused(options, expected):
    with pytest.raises(InputError, match=f"^phone.toml: group-quantize: {expected}$"):
        make_pass("group-quantize", options, "phone.toml")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "layers.0.upp.weight",
            "no matrix is called 'layers.0.upp.weight'; did you mean 'layers.0.up.weight'",
        ),
        ("norm.weight", "no matrix is called 'norm.weight'"),
        ("head.weight", "'head.weight' has no values of its own, it shares those of 'embed.weight'"),
        ("*.gate.weight", "no matrix is called"),
    ],
)
@pytest.mark.parametrize("option", ["bits_by_tensor", "group_by_tensor"])
def test_a_name_that_fits_no_matrix_is_refused(option, name, expected):
    made = GroupQuantize(**{option: {name: 8 if option == "bits_by_tensor" else 64}})
    with pytest.raises(InputError) as caught:
        made.check(model(tied={"head.weight": "embed.weight"}))
    assert expected in str(caught.value)


def test_a_group_that_does_not_divide_the_columns_is_refused_by_name():
    with pytest.raises(InputError, match=r"group size 256 does not divide the 128 columns of layers\.1\.up"):
        GroupQuantize(group_by_tensor={"layers.1.up.weight": 256}).check(model())


def test_tables_are_the_same_after_a_manifest():
    made = GroupQuantize(bits_by_tensor={"*.up.weight": 8}, group_by_tensor={"*": 64})
    assert make_pass(made.name, json.loads(json.dumps(options_of(made))), "manifest.json") == made


def test_an_option_on_the_command_line_speaks_for_all_matrices():
    table = {"bits": 4, "bits_by_tensor": {"*": 8}, "group_by_tensor": {"*": 64}}
    steps = (RecipeStep.model_validate({"pass": "group-quantize", **table}),)
    assert build_recipe(steps, QuantizationOptions(), "x") == (GroupQuantize(**table),)
    assert build_recipe(steps, QuantizationOptions(bits=4), "x") == (GroupQuantize(),)
