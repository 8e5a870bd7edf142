"""Every weight has a row, and the errors in it are those of its values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import checkpoint, normal

from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.reports.by_weight import Changes, changes_of, layer_of, rows_of, still_true


def test_the_error_is_relative_to_what_changed() -> None:
    before = checkpoint({"a": torch.full((2, 32), 2.0), "b": normal(2, 32)})
    assert changes_of(before, before) == Changes(None, {}, None)
    after = before.with_weights(checkpoint({"a": torch.full((2, 32), 3.0)}).weights)
    made = changes_of(before, after)
    assert made.error == pytest.approx(0.25)
    assert made.errors == {"a": pytest.approx(0.25)}


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_are_those_of_the_values_in_double_precision(bits: int) -> None:
    # More rows than a block of values holds.
    before = checkpoint({"w": normal(1200, 256), "v": normal(64, 256)})
    after = GroupQuantize(bits=bits).run(before).checkpoint
    made = changes_of(before, after)
    error = norm = 0.0
    for name, weight in before.weights.items():
        old = weight.float32().double()
        wrong = (after.weights[name].float32().double() - old).square().sum().item()
        assert made.errors[name] == pytest.approx(wrong / old.square().sum().item(), rel=1e-4)
        error, norm = error + wrong, norm + old.square().sum().item()
    assert made.error == pytest.approx(error / norm, rel=1e-4)


def test_errors_are_the_same_whatever_the_number_of_threads() -> None:
    before = checkpoint({"w": normal(2400, 256)})
    after = GroupQuantize(bits=4, group=32).run(before).checkpoint
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(changes_of(before, after))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_zeros_other_shapes_and_removed_weights_have_no_relative_error() -> None:
    before = checkpoint({"zero": torch.zeros(2, 32), "gone": normal(2, 32), "cut": normal(4, 32)})
    made = checkpoint({"zero": torch.ones(2, 32), "cut": normal(2, 32)})
    assert changes_of(before, replace(before, weights=made.weights)) == Changes(None, {}, None)


def test_an_error_holds_until_the_next_pass_touches_its_weight() -> None:
    before = checkpoint({"a": normal(2, 32), "b": normal(2, 32), "c": normal(2, 32)})
    weights = {"a": before.weights["a"], "b": checkpoint({"b": normal(2, 32)}).weights["b"]}
    errors = {"a": 0.1, "b": 0.2, "c": 0.3}
    assert still_true(errors, before, replace(before, weights=weights)) == {"a": 0.1}


def test_rows_say_what_a_weight_takes() -> None:
    made = checkpoint({"model.layers.3.mlp.up_proj.weight": normal(8, 64), "norm": normal(64).half()})
    quantized = GroupQuantize(bits=4, group=32).run(made).checkpoint
    rows = {row.name: row for row in rows_of(quantized, {"norm": 0.5})}
    matrix = rows["model.layers.3.mlp.up_proj.weight"]
    assert (matrix.layer, matrix.part, matrix.bits, matrix.values) == (3, "mlp.up_proj", 4, 512)
    assert matrix.bytes == 512 // 2 + 2 * 512 // 32
    assert matrix.error is None
    assert (rows["norm"].layer, rows["norm"].part, rows["norm"].error) == (None, "norm", 0.5)
    assert rows["norm"].bits == 8 * made.weights["norm"].dtype.itemsize
    assert sum(row.bytes for row in rows.values()) == quantized.bytes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.q_proj.weight", (11, "self_attn.q_proj")),
        ("bert.encoder.layer.0.ffn.1.output.dense.bias", (0, "ffn.1.output.dense.bias")),
        ("model.embed_tokens.weight", (None, "model.embed_tokens")),
    ],
)
def test_a_name_says_where_a_weight_is(name: str, expected: tuple[int | None, str]) -> None:
    assert layer_of(name) == expected
