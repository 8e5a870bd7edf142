"""Which integers differ is counted exactly, whatever the kind of weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import normal

from slm_export.optimizers.group_quantize import quantize
from slm_export.reports import codes
from slm_export.reports.codes import by_block, changes, share_changed
from slm_export.weights import Coded, Palettized, Quantized, pack_indices, quantized


def flipped(weight: Quantized, *places: tuple[int, int]) -> Quantized:
    made = weight.codes().clone()
    for row, column in places:
        made[row, column] = 2 if made[row, column] == 1 else 1
    return quantized(made, weight.scales, weight.bits)


def palettized(rows: int, columns: int, seed: int, bits: int) -> Palettized:
    drawn = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 1 << bits, (rows, columns), generator=drawn, dtype=torch.uint8)
    tables = torch.linspace(-1, 1, 1 << bits).to(torch.float16).repeat(rows // 4, 1)
    return Palettized.of((rows, columns), bits, pack_indices(indices, bits), tables)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_that_differs_is_counted(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "_BYTES", 256)  # several blocks of rows
    old = quantize(normal(16, 64), bits, 32)
    (row,) = changes({"w": old}, {"w": flipped(old, (0, 0), (7, 31), (15, 63))})
    assert (row.kind, row.changed, row.values) == ("codes", 3, 16 * 64)


def test_what_is_the_same_is_called_so() -> None:
    old = quantize(normal(16, 64), 4, 32)
    (row,) = changes({"w": old}, {"w": quantized(old.codes(), old.scales, 4)})
    assert (row.kind, row.changed) == ("same", 0)


def test_scales_alone() -> None:
    old = quantize(normal(16, 64), 4, 32)
    (row,) = changes({"w": old}, {"w": quantized(old.codes(), old.scales * 2, 4)})
    assert (row.kind, row.changed) == ("scales", 0)


@pytest.mark.parametrize("other", [quantize(normal(16, 64), 8, 64), quantize(normal(16, 64), 4, 64)])
def test_another_grid_is_another_matrix(other: Coded) -> None:
    (row,) = changes({"w": quantize(normal(16, 64), 4, 32)}, {"w": other})
    assert (row.kind, row.changed) == ("grid", 16 * 64)
    assert "4 bits, groups of 32 -> " in row.detail


@pytest.mark.parametrize("bits", [4, 6])
def test_indices_and_tables(bits: int) -> None:
    old, new = palettized(8, 32, 0, bits), palettized(8, 32, 1, bits)
    (row,) = changes({"w": old}, {"w": new})
    assert row.changed == int((old.indices() != new.indices()).sum()) > 0
    packed, tables = old.load()
    (row,) = changes({"w": old}, {"w": replace(old, load=lambda: (packed, tables * 2))})
    assert row.kind == "scales"


def test_blocks_sum_up_their_matrices() -> None:
    old = {
        "embed.weight": quantize(normal(8, 64), 8, 64),
        "layers.0.up.weight": quantize(normal(16, 64), 4, 32),
        "layers.0.down.weight": quantize(normal(16, 64, seed=1), 4, 32),
        "layers.1.up.weight": quantize(normal(16, 64, seed=2), 4, 32),
    }
    new = {**old, "layers.0.up.weight": flipped(old["layers.0.up.weight"], (3, 3))}
    del new["embed.weight"]
    rows = changes(old, new)
    blocks = {block.block: block for block in by_block(rows)}
    assert (blocks["layer 0"].matrices, blocks["layer 0"].changed_matrices) == (2, 1)
    assert blocks["layer 0"].share == pytest.approx(1 / (2 * 16 * 64))
    assert blocks["layer 1"].changed == 0
    assert (blocks["embed"].what, blocks["embed"].share) == ("1 removed", 1)
    assert share_changed(rows) == pytest.approx((8 * 64 + 1) / (8 * 64 + 3 * 16 * 64))
