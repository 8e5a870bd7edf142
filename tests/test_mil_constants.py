"""Compressed constants: what they mean, whole, in rows and one row at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mil_programs import packed, run
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.blob import BY_NAME
from slm_export.exporters.mil.operators.constant import Constant, Pool, Stored
from slm_export.exporters.mil.operators.registry import find


def stored(values: Any, element: str) -> Stored:
    kind = BY_NAME[element]
    return Stored(packed(torch.as_tensor(np.asarray(values)).to(kind.dtype), kind))


def made(kind: str, opset: int, **operands: Any) -> Constant:
    operator = find(kind, opset)
    assert operator is not None
    assert operator.constant
    operator.check(list(operands))
    constant = operator.run(**operands)
    assert isinstance(constant, Constant)
    return constant


def check(constant: Constant, expected: Tensor) -> None:
    """Whole, in blocks and by rows it is the same."""
    assert constant.shape == tuple(expected.shape)
    assert constant.dtype == expected.dtype
    wholly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(constant.tensor(), expected, **wholly)
    rows = len(expected)
    for begin in range(rows + 1):
        torch.testing.assert_close(constant.rows(begin, rows), expected[begin:], **wholly)
        torch.testing.assert_close(constant.rows(0, begin), expected[:begin], **wholly)
    index = torch.tensor([rows - 1, 0, 0, rows // 2])
    torch.testing.assert_close(constant.take(index), expected[index], **wholly)
    torch.testing.assert_close(constant.take(index[:0]), expected[:0], **wholly)


ELEMENTS = ["int4", "uint4", "uint1", "uint2", "uint3", "uint6", "int8", "uint8", "fp16", "int32"]


@given(st.sampled_from(ELEMENTS), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.randoms())
def test_packed_elements_come_back(element: str, rows: int, columns: int, depth: int, random: Any) -> None:
    kind = BY_NAME[element]
    low = -(1 << (kind.bits - 1)) if element.startswith("int") else 0
    high = low + (1 << min(kind.bits, 8))
    values = [random.randrange(low, high) for _ in range(rows * columns * depth)]
    shaped = torch.tensor(values).to(kind.dtype).view(rows, columns, depth)
    check(Stored(packed(shaped, kind)), shaped)


CODES = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}


@pytest.mark.parametrize("element", CODES)
@pytest.mark.parametrize("blocks", [(1, 1), (6, 1), (2, 4), (6, 8), (1, 2), (3, 8)])
@pytest.mark.parametrize("shifted", [True, False])
def test_a_scale_per_block(element: str, blocks: tuple[int, int], shifted: bool) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(*CODES[element], size=(6, 8))
    scale = rng.normal(size=blocks).astype(np.float16)
    offset = rng.integers(*CODES[element], size=blocks)
    spread = (np.repeat(np.repeat(part, 6 // blocks[0], 0), 8 // blocks[1], 1) for part in (scale, offset))
    scales, offsets = (part.astype(np.float32) for part in spread)
    expected = scales * (codes.astype(np.float32) - (offsets if shifted else 0))
    given = {"data": stored(codes, element), "scale": Stored(packed(torch.from_numpy(scale)))}
    if shifted:
        given["offset"] = stored(offset, element)
    check(made("constexpr_blockwise_shift_scale", 18, **given), torch.from_numpy(expected).half())


def test_scales_may_make_infinity_and_have_to_fit() -> None:
    data = stored([[7, -8]], "int4")
    scale = Stored(packed(torch.tensor([[60000.0]]).half()))
    check(
        made("constexpr_blockwise_shift_scale", 18, data=data, scale=scale),
        torch.tensor([[torch.inf, -torch.inf]]).half(),
    )
    for wrong in (torch.ones(1), torch.ones(1, 3), torch.ones(1, 0)):
        with pytest.raises(InputError, match="scales"):
            made("constexpr_blockwise_shift_scale", 18, data=data, scale=Stored(packed(wrong)))
    with pytest.raises(InputError, match="int8 offsets for int4 data"):
        made("constexpr_blockwise_shift_scale", 18, data=data, scale=scale, offset=stored([[1]], "int8"))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_affine_along_an_axis(axis: int) -> None:
    rng = np.random.default_rng(0)
    codes, size = rng.integers(0, 256, size=(2, 3, 4)), (2, 3, 4)[axis]
    scale, zero = rng.normal(size=size).astype(np.float16), rng.integers(0, 256, size=size)
    shape = [1, 1, 1]
    shape[axis] = size
    expected = scale.astype(np.float32).reshape(shape) * (codes - zero.reshape(shape)).astype(np.float32)
    constant = made(
        "constexpr_affine_dequantize",
        16,
        quantized_data=stored(codes, "uint8"),
        zero_point=stored(zero, "uint8"),
        scale=Stored(packed(torch.from_numpy(scale))),
        axis=stored(axis, "int32"),
    )
    check(constant, torch.from_numpy(expected).half())


def test_affine_by_scalars() -> None:
    operands = {
        "zero_point": stored(3, "int8"),
        "scale": Stored(packed(torch.tensor(0.5))),
        "axis": stored(0, "int32"),
    }
    constant = made("constexpr_affine_dequantize", 16, quantized_data=stored([5, -5], "int8"), **operands)
    check(constant, torch.tensor([1.0, -4.0]))


def test_tables_of_the_pages() -> None:
    indices = stored([[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]], "uint2")
    tables = torch.tensor([1.0, 5, 9, 13, 2, 10, 18, 26]).half().view(2, 1, 4, 1)
    expected = torch.tensor([[9.0, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]).half()
    check(made("constexpr_lut_to_dense", 18, indices=indices, lut=Stored(packed(tables))), expected)
    indices = stored([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], "uint1")
    (a0, a1, a2), (b0, b1, b2) = vectors = [[10, 11, 12], [20, 21, 22]]
    table = stored(np.array(vectors).reshape(1, 1, 1, 2, 3), "int8")
    along_1 = [
        [[a0, a0], [a1, a1], [a2, a2], [b0, a0], [b1, a1], [b2, a2]],
        [[b0, b0], [b1, b1], [b2, b2], [a0, a0], [a1, a1], [a2, a2]],
    ]
    along_2 = [
        [[a0, a1, a2, a0, a1, a2], [b0, b1, b2, a0, a1, a2]],
        [[b0, b1, b2, b0, b1, b2], [a0, a1, a2, a0, a1, a2]],
    ]
    for axis, wanted in ((1, along_1), (2, along_2)):
        constant = made(
            "constexpr_lut_to_dense", 18, indices=indices, lut=table, vector_axis=stored(axis, "int32")
        )
        check(constant, torch.tensor(wanted, dtype=torch.int8))
    packed_16 = Stored(packed(torch.tensor([0b01101100, 0b11], dtype=torch.uint8)))
    shape = Stored(packed(torch.tensor([5]).to(torch.uint32)))
    lut = Stored(packed(torch.tensor([10.0, 11, 12, 13])))
    check(
        made("constexpr_lut_to_dense", 16, indices=packed_16, lut=lut, shape=shape),
        torch.tensor([10.0, 13, 12, 11, 13]),
    )


def test_sparse_of_the_pages() -> None:
    values = Stored(packed(torch.tensor([7.0, 8]).half()))
    expected = torch.tensor([0.0, 0, 7, 8, 0]).half()
    mask = Stored(packed(torch.tensor([0b01100], dtype=torch.uint8)))
    shape = Stored(packed(torch.tensor([5]).to(torch.uint32)))
    check(made("constexpr_sparse_to_dense", 16, nonzero_data=values, mask=mask, shape=shape), expected)
    mask = stored([[0, 1, 0], [1, 0, 0]], "uint1")
    check(
        made("constexpr_sparse_to_dense", 18, nonzero_data=values, mask=mask),
        torch.tensor([[0.0, 7, 0], [8, 0, 0]]).half(),
    )
    with pytest.raises(InputError, match="for a mask of 3 ones"):
        made("constexpr_sparse_to_dense", 18, nonzero_data=values, mask=stored([[1, 1, 1]], "uint1"))


def test_sparse_codes_of_the_pages() -> None:
    codes, columns = [10, 11, 3, 4, 5, 6, 7, 8, 9], [0, 1, 0, 1, 2, 2, 3, 0, 1]
    mask = stored([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], "uint1")
    scale, offset = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), [[1, 2, 3, 4]]
    operator = find("constexpr_sparse_blockwise_shift_scale", 18)
    assert operator is not None
    same, nonzero = operator.run(
        data_mask=mask,
        nonzero_data=stored(codes, "int8"),
        scale=Stored(packed(scale)),
        offset=stored(offset, "int8"),
    )
    assert same is mask
    expected = torch.tensor(
        [(code - offset[0][c]) * scale[0, c] for code, c in zip(codes, columns, strict=True)]
    )
    check(nonzero, expected)
    dense = torch.zeros(4, 4)
    dense[mask.tensor().bool()] = expected
    check(made("constexpr_sparse_to_dense", 18, nonzero_data=nonzero, mask=same), dense)
    with pytest.raises(InputError, match="for a mask of 9 ones"):
        operator.run(data_mask=mask, nonzero_data=stored(codes[1:], "int8"), scale=Stored(packed(scale)))


@given(st.integers(1, 6), st.integers(1, 5), st.randoms())
def test_what_is_not_0_is_found_again(rows: int, groups: int, random: Any) -> None:
    """Rows without a value, and an odd number of int4 codes, among them."""
    codes = torch.tensor([[random.choice((0, 0, -8, 3, 7)) for _ in range(4 * groups)] for _ in range(rows)])
    scale = torch.tensor([[2.0 ** -random.randrange(9) for _ in range(groups)] for _ in range(rows)]).half()
    mask = stored((codes != 0).numpy(), "uint1")
    operator = find("constexpr_sparse_blockwise_shift_scale", 18)
    assert operator is not None
    left = stored(codes[codes != 0].numpy(), "int4")
    _, nonzero = operator.run(data_mask=mask, nonzero_data=left, scale=Stored(packed(scale)))
    dense = (codes.view(rows, groups, 4) * scale.unsqueeze(-1)).view(rows, -1).half()
    for begin in range(len(codes[codes != 0]) + 1):
        assert torch.equal(nonzero.rows(begin, nonzero.shape[0]), dense[codes != 0][begin:])
        assert torch.equal(nonzero.rows(0, begin), dense[codes != 0][:begin])
    check(made("constexpr_sparse_to_dense", 18, nonzero_data=nonzero, mask=mask), dense)


def test_a_cast_constant() -> None:
    values = torch.tensor([[1.5], [torch.inf]]).half()
    check(made("constexpr_cast", 16, source_val=Stored(packed(values)), output_dtype="fp32"), values.float())


def test_compressed_beside_coremltools() -> None:
    pytest.importorskip("coremltools")
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.type_mapping import nptype_from_builtin

    rng = np.random.default_rng(0)
    uint4, int4, uint1 = (nptype_from_builtin(kind) for kind in (types.uint4, types.int4, types.uint1))
    mask = rng.integers(0, 2, size=(4, 6))
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            "constexpr_blockwise_shift_scale",
            {
                "data": rng.integers(-8, 8, size=(4, 6)).astype(int4),
                "scale": rng.normal(size=(2, 3)).astype(np.float16),
                "offset": rng.integers(-8, 8, size=(2, 3)).astype(int4),
            },
        ),
        (
            "constexpr_lut_to_dense",
            {
                "indices": rng.integers(0, 16, size=(4, 6)).astype(uint4),
                "lut": rng.normal(size=(2, 3, 16, 2)).astype(np.float16),
                "vector_axis": 1,
            },
        ),
        (
            "constexpr_sparse_to_dense",
            {"nonzero_data": rng.normal(size=int(mask.sum())).astype(np.float16), "mask": mask.astype(uint1)},
        ),
    ]
    elements = {"data": "int4", "offset": "int4", "indices": "uint4", "mask": "uint1", "vector_axis": "int32"}

    def inferred(kind: str, operands: dict[str, Any]) -> Any:
        made: list[Any] = []

        @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS18)
        def program(x: Any) -> Any:
            made.append(getattr(mb, kind)(**copy.deepcopy(operands)).op.materialized_val_inference())
            return mb.identity(x=x)

        return made[0]

    for kind, operands in cases:
        ours = {
            name: stored(np.asarray(value).astype(np.int64), elements[name])
            if name in elements
            else Stored(packed(torch.from_numpy(value)))
            for name, value in operands.items()
        }
        check(made(kind, 18, **ours), torch.from_numpy(inferred(kind, operands)))


def test_a_matrix_is_kept_only_within_the_budget() -> None:
    codes = torch.randint(-8, 8, (64, 32), dtype=torch.int8)
    x = torch.randn(3, 32).half()
    results = []
    for budget in (64 * 32 * 4 - 1, 64 * 32 * 4):
        pool = Pool(budget)
        data, scale = (
            pool.stored(packed(codes, BY_NAME["int4"])),
            pool.stored(packed(torch.rand(64, 2).half())),
        )
        torch.manual_seed(0)
        scale = pool.stored(packed(torch.rand(64, 2).half()))
        operator = find("constexpr_blockwise_shift_scale", 18)
        assert operator is not None
        (weight,) = pool.once("key", lambda run=operator.run, d=data, s=scale: run(data=d, scale=s), None)
        results.append(run("linear", x=x, weight=weight)[0])
        kept = weight.ready()
        assert (kept is not None) == (budget == 64 * 32 * 4)
        assert not pool.admits(64 * 32 * 4)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
