"""What palettize makes of every kind of weight, what it costs, and that nothing else takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import checkpoint, normal
from torch import Tensor

from slm_export.bundles.finished import CACHE_VARIABLE, finished_weights
from slm_export.checkpoint import Checkpoint
from slm_export.compilation import Request, make_plan
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.optimizers import palettize as module
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.palettize import Palettize, palettize
from slm_export.profile import RecipeStep
from slm_export.recipe import QuantizationOptions, build_recipe, lowest_bits, unaccounted
from slm_export.settings import Settings
from slm_export.source.load import load_checkpoint
from slm_export.weights import (
    TABLE_BITS,
    Dense,
    Palettized,
    Quantized,
    float_blocks,
    pack_indices,
    unpack_indices,
)

SHAPE = (32, 64)
VALUES: Mapping[str, Tensor] = {
    "normal": normal(*SHAPE),
    "heavy tails": normal(*SHAPE) ** 3,
    "tiny": normal(*SHAPE, scale=2.0**-20),
    "few values": normal(*SHAPE).sign(),
    "constant": torch.full(SHAPE, 0.3),
    "one outlier": torch.cat([normal(31, 64), torch.full((1, 64), 50.0)]),
}


def oracle(values: Tensor, weight: Palettized) -> Tensor:
    """Return, for each value, the entry of its table that is nearest, tried one by one."""
    tables = weight.tables.double().repeat_interleave(weight.group, dim=0)
    nearest = (values.double().unsqueeze(-1) - tables.unsqueeze(1)).abs().argmin(-1)
    return tables.gather(1, nearest).float()


def squared_error(values: Tensor, weight: Palettized) -> float:
    return (values.double() - weight.float32().double()).square().sum().item()


def least_error(values: Tensor, entries: int) -> float:
    """Return the least squared error that any table has for some values (Bellman, 1973: clusters are intervals)."""
    ordered = np.sort(values.double().flatten().numpy())
    count = len(ordered)
    sums, squares = (np.concatenate([[0], np.cumsum(ordered**power)]) for power in (1, 2))
    begin, end = np.arange(count + 1)[:, None], np.arange(count + 1)[None, :]
    within = squares[end] - squares[begin] - (sums[end] - sums[begin]) ** 2 / np.maximum(end - begin, 1)
    cost = np.where(begin <= end, np.maximum(within, 0), np.inf)
    best = cost[0]
    for _ in range(entries - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


# --- tables and indices ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", TABLE_BITS)
@pytest.mark.parametrize("kind", VALUES)
def test_every_value_becomes_the_nearest_entry_of_its_table(kind: str, bits: int) -> None:
    values = VALUES[kind]
    weight = palettize(values, bits, 16)
    assert (weight.shape, weight.bits, weight.group) == (SHAPE, bits, 16)
    assert (weight.tables.shape, weight.tables.dtype) == ((2, 1 << bits), torch.float16)
    assert (weight.tables.diff(dim=1) >= 0).all()
    distance, least = (weight.float32() - values).abs(), (oracle(values, weight) - values).abs()
    assert torch.equal(distance, least)


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_no_step_of_the_search_makes_the_error_larger(bits: int) -> None:
    groups = VALUES["heavy tails"].reshape(2, -1)
    ordered = groups.sort(dim=1).values.double()
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    centres, errors = module._start(ordered, 1 << bits), []
    for _ in range(12):
        errors.append((ordered.unsqueeze(-1) - centres.unsqueeze(1)).square().amin(-1).sum(1))
        centres = module._step(ordered, sums, centres)
    steps = torch.stack(errors).diff(dim=0)
    assert (steps <= 1e-12).all()  # float64 sums of 1024 squares
    assert (steps[0] < 0).all()


@pytest.mark.parametrize(("bits", "at_most"), [(4, 1.05), (6, 1.15)])
def test_tables_of_a_real_matrix_are_nearly_the_best_there_are(
    bits: int, at_most: float, pycode: Path
) -> None:
    values = load_checkpoint(pycode).weights["model.layers.0.self_attn.q_proj.weight"].float32()[:8]
    assert squared_error(values, palettize(values, bits, 8)) < at_most * least_error(values, 1 << bits)


def test_more_bits_and_fewer_rows_per_table_cost_less(pycode: Path) -> None:
    values = load_checkpoint(pycode).weights["model.layers.5.mlp.down_proj.weight"].float32()
    errors = [
        squared_error(values, palettize(values, bits, group)) for bits, group in ((4, 256), (4, 16), (6, 16))
    ]
    assert errors[0] > 1.02 * errors[1] > 10 * errors[2]


def test_a_group_of_zeros_is_zero() -> None:
    values = torch.cat([torch.zeros(4, 16), normal(4, 16)])
    weight = palettize(values, 4, 4)
    assert not weight.tables[0].any()
    assert not weight.float32()[:4].any()
    assert weight.float32()[4:].any(1).all()


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_what_was_pruned_stays_pruned(bits: int) -> None:
    """Although the values nearest to zeros have another mean."""
    values = normal(16, 64)
    values[5] = 0
    values[9, ::4] = 0
    made = palettize(values, bits, 16).float32()
    assert not made[values == 0].any()
    assert made[values.abs() > 1].all()


def test_few_values_are_kept_exactly() -> None:
    values = torch.tensor([-1.5, -0.25, 0.0, 0.75, 2.0])[torch.randint(0, 5, (16, 32))]
    assert torch.equal(palettize(values, 4, 16).float32(), values)


def test_neither_threads_nor_blocks_make_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(96, 128) ** 3
    threads, made = torch.get_num_threads(), []
    try:
        for count, block in ((1, 1 << 18), (2, 1 << 18), (2, 5 * 16 * 128)):
            torch.set_num_threads(count)
            monkeypatch.setattr(module, "_BLOCK", block)
            made.append(palettize(values, 6, 16).load())
    finally:
        torch.set_num_threads(threads)
    for other in made[1:]:
        assert all(torch.equal(one, two) for one, two in zip(made[0], other, strict=True))


# --- storage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_indices_lie_one_after_the_other_the_first_in_the_lowest_bits(bits: int) -> None:
    indices = torch.randint(0, 1 << bits, (5, 12), dtype=torch.uint8)
    packed = pack_indices(indices, bits)
    assert packed.shape == (5, 12 * bits // 8)
    for row, stored in zip(indices.tolist(), packed.numpy(), strict=True):
        stream = int.from_bytes(stored.tobytes(), "little")
        assert [stream >> (bits * at) & ((1 << bits) - 1) for at in range(12)] == row
    assert torch.equal(unpack_indices(packed, bits), indices)


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_rows_and_blocks_are_those_of_the_whole(bits: int) -> None:
    weight = palettize(VALUES["normal"], bits, 8)
    whole = weight.float32()
    index = torch.tensor([31, 0, 8, 8])
    assert torch.equal(weight.rows(index), whole[index])
    assert torch.equal(weight.rows(slice(5, 11)), whole[5:11])
    assert torch.equal(torch.cat(list(float_blocks(weight, 5 * 64))), whole)
    assert weight.bytes == weight.packed.numel() + 2 * weight.tables.numel()


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_a_finished_weight_is_found_again_bit_for_bit(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    source = checkpoint({"w": VALUES["normal"], "n": torch.ones(64)})
    made = Palettize(bits).run(source).checkpoint.weights["w"]
    finished = finished_weights(["model"])
    Palettize(bits).run(source, Workbench(finished))
    monkeypatch.setattr(module, "palettize", None)  # an interrupted export does not make it again
    again = finished_weights(["model"])
    found = Palettize(bits).run(source, Workbench(again)).checkpoint.weights["w"]
    assert again.reused == ["w"]
    assert isinstance(made, Palettized)
    assert isinstance(found, Palettized)
    assert (found.shape, found.bits, found.group) == (made.shape, made.bits, made.group)
    assert all(torch.equal(one, other) for one, other in zip(found.load(), made.load(), strict=True))


# --- the pass ----------------------------------------------------------------------------------------


def model(**weights: Tensor) -> Checkpoint:
    """A tied decoder with all roles."""
    made = {
        "embed": normal(48, 64, seed=1),
        "positions": normal(16, 64, seed=2),
        "proj": normal(*SHAPE, seed=3),
        "norm": torch.ones(64),
        **weights,
    }
    return checkpoint(made, {"embed": "embedding", "positions": "table"}, {"lm_head": "embed"})


def kinds(made: Checkpoint) -> dict[str, tuple[str, int]]:
    return {
        name: (type(weight).__name__, 0 if isinstance(weight, Dense) else weight.bits)
        for name, weight in made.weights.items()
    }


@pytest.mark.parametrize(
    ("embedding", "expected"),
    [
        (8, ("Quantized", 8)),
        (6, ("Palettized", 6)),
        (4, ("Palettized", 4)),
        (16, ("Dense", 0)),
        (32, ("Dense", 0)),
    ],
)
def test_embeddings_are_treated_as_group_quantize_does(embedding: Any, expected: tuple[str, int]) -> None:
    source = model()
    result = Palettize(6, embedding_bits=embedding).run(source)
    found = kinds(result.checkpoint)
    assert found["proj"] == ("Palettized", 6)
    assert found["embed"] == expected
    assert found["positions"] == (("Dense", 0) if embedding > 8 else ("Quantized", 8))
    assert not unaccounted(source, result.checkpoint, result.skipped)
    assert result.skipped["norm"] == "a vector or a norm: small, and precision matters"
    assert not result.notes


def test_a_head_of_its_own_has_bits_of_its_own() -> None:
    source = checkpoint({"head": normal(48, 64)}, {"head": "head"})
    assert kinds(Palettize(4, head_bits=6).run(source).checkpoint) == {"head": ("Palettized", 6)}
    assert kinds(Palettize(4, embedding_bits=6, head_bits=8).run(source).checkpoint) == {
        "head": ("Quantized", 8)
    }


@pytest.mark.parametrize(
    ("rows", "asked", "group"), [(48, 16, 16), (30, 16, 15), (2, 16, 2), (37, 16, 1), (48, 0, 48)]
)
def test_rows_share_a_table_as_far_as_they_divide(rows: int, asked: int, group: int) -> None:
    source = checkpoint({"w": normal(rows, 256)})
    weight = Palettize(4, group_channels=asked).run(source).checkpoint.weights["w"]
    assert isinstance(weight, Palettized)
    assert weight.group == group


@pytest.mark.parametrize(
    ("values", "bits", "reason"),
    [
        (normal(16, 50), 6, "rows of 50 indices of 6 bits do not end with a byte"),
        (normal(37, 64), 6, "37 tables for 37 rows of 64 values would take more than they save"),
        (
            torch.cat([normal(15, 64), torch.full((1, 64), 7e4)]),
            4,
            "holds 7e+04, beyond the range of float16",
        ),
    ],
)
def test_what_tables_do_not_fit_is_stored_in_8_bits_and_said(values: Tensor, bits: Any, reason: str) -> None:
    result = Palettize(bits).run(checkpoint({"w": values}))
    assert isinstance(result.checkpoint.weights["w"], Quantized)
    (note,) = result.notes
    assert note.startswith("w is stored in 8 bits")
    assert reason in note


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8}, "palettize: bits must be 4 or 6, not 8"),
        ({"embedding_bits": 5}, "palettize: embedding_bits must be 4, 6, 8, 16 or 32, not 5"),
        ({"head_bits": 2}, "palettize: head_bits must be"),
        ({"group_channels": -1}, "palettize: group_channels must be a number of rows, or 0 for all, not -1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Palettize(**options)


def test_a_tied_pair_has_one_number_of_bits() -> None:
    with pytest.raises(InputError, match="ties its head to its embedding"):
        Palettize(embedding_bits=8, head_bits=6).run(model())


# --- recipes and plans -------------------------------------------------------------------------------

NOTHING = QuantizationOptions()
GRID = RecipeStep.model_validate({"pass": "group-quantize", "bits": 4, "group": 64, "embedding_bits": 16})
TABLES = RecipeStep.model_validate({"pass": "palettize", "bits": 6, "embedding_bits": 6})


@pytest.mark.parametrize(
    ("step", "options", "expected"),
    [
        (TABLES, NOTHING, Palettize(6, embedding_bits=6)),
        (TABLES, QuantizationOptions(embedding_bits=16), Palettize(6, embedding_bits=16)),
        (TABLES, QuantizationOptions(palettize=4), Palettize(4, embedding_bits=6)),
        (TABLES, QuantizationOptions(bits=4), GroupQuantize(4)),
        (TABLES, QuantizationOptions(bits=16), GroupQuantize(16, embedding_bits=16)),
        (TABLES, QuantizationOptions(group_size=128), GroupQuantize(group=128)),
        (GRID, QuantizationOptions(palettize=6), Palettize(6, embedding_bits=16)),
        (GRID, QuantizationOptions(palettize=4, embedding_bits=6), Palettize(4, embedding_bits=6)),
        (None, QuantizationOptions(palettize=4), Palettize(4)),
    ],
)
def test_options_choose_between_codes_and_tables(
    step: RecipeStep | None, options: QuantizationOptions, expected: object
) -> None:
    assert build_recipe((step,) if step else (), options, "x") == (expected,)


@pytest.mark.parametrize("other", [{"bits": 8}, {"group_size": 64}])
def test_codes_and_tables_at_once_are_refused(other: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"palettize 4 stores tables in place of codes and scales.*give one"):
        build_recipe((GRID,), QuantizationOptions(palettize=4, **other), "x")


def test_the_command_line_goes_before_the_settings() -> None:
    settings = Settings(bits=8, group_size=64, embedding_bits=8)
    tables = Request(quantization=QuantizationOptions(palettize=6)).over(settings).quantization
    assert tables == QuantizationOptions(palettize=6, embedding_bits=8)
    settings = Settings(palettize=6)
    codes = Request(quantization=QuantizationOptions(bits=8)).over(settings).quantization
    assert codes == QuantizationOptions(bits=8)
    assert Request().over(settings).quantization == QuantizationOptions(palettize=6)


@pytest.mark.parametrize(
    ("device", "format"),
    [("pixel-8", "executorch"), ("pixel-8", "litert"), ("raspberry-pi-5", "onnx")],
)
def test_formats_without_tables_are_refused_before_any_work(device: str, format: str) -> None:
    asked = Request("m", device=device, formats=(format,), quantization=QuantizationOptions(palettize=6))
    words = rf"palettize: format {format} has no tables.*export coreml for a device that runs it, or give --bits 8"
    with pytest.raises(InputError, match=words):
        make_plan(asked)
    both = Request("m", device="iphone-16", formats=("coreml", "executorch"), quantization=asked.quantization)
    with pytest.raises(InputError, match="palettize: format executorch"):
        make_plan(both)


@pytest.mark.parametrize("group", [0, 16])
def test_ios_17_has_one_table_per_matrix(group: int, tmp_path: Path) -> None:
    file = tmp_path / "phone.toml"
    file.write_text(
        'schema = 1\nname = "phone"\ntitle = "Phone"\ntarget = "ios"\nformats = ["coreml"]\n[coreml]\nios = 17\n'
        f'[[recipe]]\npass = "palettize"\nbits = 6\ngroup_channels = {group}\n'
    )
    asked = Request("m", device=str(file))
    if not group:
        assert make_plan(asked).recipe == (Palettize(6, group_channels=0),)
        return
    with pytest.raises(InputError, match=r"palettize: coreml for iOS 17 .* group_channels = 0"):
        make_plan(asked)


@pytest.mark.parametrize(("bits", "gates"), [(4, 4), (6, 8)])
def test_gates_go_by_the_fewest_bits(bits: Any, gates: int) -> None:
    assert lowest_bits(Palettize(bits).run(model()).checkpoint) == gates
