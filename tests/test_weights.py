"""The integer grid: codes and scales that every format can hold bit for bit."""

from __future__ import annotations

import pytest
import torch
from checkpoints import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slm_export.weights import (
    SMALLEST_SCALE,
    Dense,
    Quantized,
    grid_scale,
    pack_int4,
    quantized,
    unpack_int4,
)

LARGEST_SCALE = 65280.0  # the largest bfloat16 that float16 holds


def test_every_pair_of_codes_survives_packing():
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


def test_values_are_codes_times_scales_for_every_byte():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    weight = Quantized.of((4, 128), 4, packed, torch.tensor([[0.5, 2.0]]).repeat(4, 1))
    codes = unpack_int4(packed).to(torch.float32)
    expected = torch.cat((codes[:, :64] * 0.5, codes[:, 64:] * 2.0), dim=1)
    for _ in range(2):  # the table that codes are read from is not written to
        assert torch.equal(weight.float32(), expected)
    assert torch.equal(weight.rows(slice(1, 3)), expected[1:3])


def test_every_byte_survives_unpacking():
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_the_even_column_is_in_the_low_nibble():
    assert pack_int4(torch.tensor([[1, -2, -8, 7]], dtype=torch.int8)).tolist() == [[0xE1, 0x78]]


@given(st.floats(0, LARGEST_SCALE, width=32))
def test_a_grid_scale_is_exact_in_every_float(value):
    scale = grid_scale(torch.tensor([value]))
    assert scale.dtype == torch.float32
    assert scale.item() >= SMALLEST_SCALE
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(scale.to(dtype).to(torch.float32), scale)


@given(st.floats(SMALLEST_SCALE, LARGEST_SCALE, width=32))
def test_a_grid_scale_is_the_nearest_one(value):
    # bfloat16 has 8 significant bits, so half a unit in the last place is at most 2^-8 of the value.
    assert abs(grid_scale(torch.tensor([value])).item() - value) <= value * 2.0**-8


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (8, -127, 127)])
def test_a_value_is_its_code_times_the_scale_of_its_group(bits, low, high):
    codes = torch.randint(low, high + 1, (3, 128), generator=torch.Generator().manual_seed(0))
    scales = grid_scale(torch.tensor([[0.5, 2.0], [0.25, 1.0], [3.0, 0.0]]))
    scales = scales if bits == 4 else scales[:, :1]
    weight = quantized(codes.to(torch.int8), scales, bits)
    assert torch.equal(weight.codes(), codes.to(torch.int8))
    assert weight.group == 128 // scales.shape[1]
    for row in range(3):
        for column in range(128):
            expected = codes[row, column] * scales[row, column // weight.group]
            assert weight.float32()[row, column] == expected


def test_the_size_is_that_of_codes_and_bfloat16_scales():
    codes, scales = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2)
    assert quantized(codes, scales, 4).bytes == 4 * 64 // 2 + 4 * 2 * 2
    assert quantized(codes, scales[:, :1], 8).bytes == 4 * 64 + 4 * 2
    assert quantized(codes, scales, 4).count == 4 * 64


def test_shapes_that_contradict_each_other_are_our_own_bug():
    with pytest.raises(AssertionError):
        Quantized.of((4, 64), 4, torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2))
    with pytest.raises(AssertionError):
        Quantized.of((4, 64), 8, torch.zeros(4, 64, dtype=torch.int8), torch.ones(3, 1))


def test_dense_floats_are_read_when_asked_for_and_not_before():
    reads: list[int] = []

    def load() -> Tensor:
        reads.append(1)
        return normal(3, 5).to(torch.bfloat16)

    weight = Dense((3, 5), torch.bfloat16, load)
    assert (weight.count, weight.bytes, len(reads)) == (15, 30, 0)
    assert weight.float32().dtype == torch.float32
    assert torch.equal(weight.float32(), normal(3, 5).to(torch.bfloat16).float())
    assert len(reads) == 2
