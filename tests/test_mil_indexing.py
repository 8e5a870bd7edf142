"""MIL's slices, gathers and scatters beside NumPy, and the bounds they keep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mil_programs import only, run
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.operators.slice import slice_update


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def same(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


slices = st.integers(0, 5).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.integers(-7, 7),
        st.integers(-7, 7),
        st.sampled_from([1, 2, 3, -1, -2]),
        st.booleans(),
        st.booleans(),
    )
)


@given(st.lists(slices, min_size=1, max_size=3), st.booleans())
def test_slices_are_numpy_s(dims: list[tuple[int, int, int, int, bool, bool]], constant: bool) -> None:
    shape, begin, end, stride, from_start, to_end = (list(part) for part in zip(*dims, strict=True))
    x = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    index = tuple(slice(None if a else b, None if z else e, s) for _, b, e, s, a, z in dims)
    given: dict[str, Any] = {
        "begin": begin, "end": end, "stride": stride, "begin_mask": from_start, "end_mask": to_end,
    }  # fmt: skip
    if not constant:
        given = {name: torch.tensor(value) for name, value in given.items()}
    tensor = torch.from_numpy(x.copy())
    made = only("slice_by_index", x=tensor, **given)
    np.testing.assert_array_equal(made.numpy(), x[index])
    update = torch.from_numpy(-1 - x[index])
    for in_place in (False, True):
        target = tensor.clone()
        if in_place:
            made = slice_update(target, update, in_place=True, **given)
            assert made is target or not target.numel()
        else:
            made = only("slice_update", x=target, update=update, **given)
            same(target, tensor)
        expected = x.copy()
        expected[index] = update.numpy()
        np.testing.assert_array_equal(made.numpy(), expected)


def test_single_positions_are_taken_out() -> None:
    x = torch.arange(12).view(3, 4).int()
    given = {"begin": [-1, 1], "end": [0, 3], "squeeze_mask": [True, False]}
    same(only("slice_by_index", x=x, **given), ints(9, 10))
    made = only("slice_update", x=x, update=ints(70, 71), **given)
    assert made[2].tolist() == [8, 70, 71, 11]
    with pytest.raises(InputError, match="index 3 is out of bounds of a dimension of 3"):
        run("slice_by_index", x=x, begin=[3, 0], end=[0, 4], squeeze_mask=[True, False])
    for wrong in (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(2)):
        with pytest.raises(InputError, match="of one type and shape"):
            run("slice_update", x=x, update=wrong, **given)
    with pytest.raises(InputError, match="5 elements from 1"):
        run("slice_by_size", x=x, begin=[0, 1], size=[1, 5])


@pytest.mark.parametrize(
    ("opset", "shape", "wanted", "expected"),
    [
        (17, (2, 50), [1, 0, -1, 0], (1, 1, 2, 50)),  # the page's example
        (17, (2, 3, 4), [0, 0], None),
        (17, (2, 3, 4), [-1, 0], (6, 4)),
        (15, (2, 3), [0, -1], (2, 3)),
        (15, (2, 3), [0, -1, 1], None),
        (17, (2, 3), [-1, -1], None),
        (17, (2, 3), [4], None),
        (17, (0, 3), [3, 0], (3, 3)),
        (17, (1,), [], ()),
    ],
)  # fmt: skip
def test_reshape(opset: int, shape: Any, wanted: list[int], expected: Any) -> None:
    x = torch.zeros(shape)
    if expected is None or math.prod(expected) != x.numel():
        with pytest.raises((InputError, RuntimeError)):
            run("reshape", opset, x=x, shape=wanted)
    else:
        assert only("reshape", opset, x=x, shape=torch.tensor(wanted, dtype=torch.int32)).shape == expected


@pytest.mark.parametrize("index", [-1, 3, 300])
def test_an_index_out_of_bounds(index: int) -> None:
    x, at = torch.arange(6.0).view(3, 2), ints(0, index)
    cases = {
        "gather": {"x": x, "indices": at},
        "gather_along_axis": {"x": x, "indices": at.view(2, 1)},
        "gather_nd": {"x": x, "indices": at.view(2, 1)},
        "scatter": {"data": x, "indices": at, "updates": torch.ones(2, 2)},
        "scatter_along_axis": {"data": x, "indices": at.view(2, 1), "updates": torch.ones(2, 1)},
        "scatter_nd": {"data": x, "indices": at.view(2, 1), "updates": torch.ones(2, 2)},
    }
    for kind, operands in cases.items():
        for validate in (True, False):
            with pytest.raises(InputError, match=f"index {index} is out of bounds of a dimension of 3"):
                run(kind, 17, validate_indices=validate, **operands)
        if index == -1:
            last = {**operands, "indices": torch.where(operands["indices"] < 0, 2, operands["indices"])}
            same(only(kind, 15, **operands), only(kind, 17, **last))
        else:
            with pytest.raises(InputError, match="out of bounds"):
                run(kind, 15, **operands)
    many = torch.zeros(40, dtype=torch.int32)
    many[39] = index
    with pytest.raises(InputError, match=f"index {index} "):
        run("gather", 17, x=x, indices=many)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.uint8, torch.int8])
def test_gather_takes_narrow_indices_and_gathers_them(dtype: torch.dtype) -> None:
    values = torch.arange(6).to(dtype)
    index = torch.tensor([[5, 0], [1, 1]]).to(dtype)
    made = only("gather", 17, x=values, indices=index)
    assert made.dtype == dtype
    assert made.tolist() == [[5, 0], [1, 1]]
    made = only("gather_along_axis", 17, x=values.view(2, 3), indices=(index.long() % 2).to(dtype), axis=0)
    assert made.tolist() == [[3, 1], [3, 4]]
    assert only("gather", 17, x=values, indices=index[:0]).shape == (0, 2)


def test_gather_nd_with_batches() -> None:
    x, index = torch.randn(2, 3, 4, 5), torch.tensor([[[0, 1], [2, 3]], [[1, 0], [0, 0]]])
    made = only("gather_nd", 17, x=x, indices=index, batch_dims=1)
    same(made, torch.stack([torch.stack([x[b, i, j] for i, j in index[b]]) for b in range(2)]))


@pytest.mark.parametrize("mode", ["update", "add", "sub", "mul", "div", "max", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_scatter_combines(mode: str, dtype: torch.dtype) -> None:
    functions: dict[str, Any] = {
        "update": lambda a, b: b, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b, "max": max, "min": min,
    }  # fmt: skip
    data, at = torch.tensor([[60, 2, 30], [4, 50, 60]]).to(dtype), ints(2, 0, 2)
    updates = torch.tensor([[5, 3, 5], [2, 10, 2]]).to(dtype)
    expected = data.tolist()
    for row in range(2):
        for position, index in enumerate(at.tolist()):
            expected[row][index] = functions[mode](expected[row][index], updates[row, position].item())
    wanted = torch.tensor(expected).to(dtype)
    same(only("scatter", data=data, indices=at, updates=updates, axis=1, mode=mode), wanted)
    along = at.expand(2, 3)
    same(only("scatter_along_axis", data=data, indices=along, updates=updates, axis=-1, mode=mode), wanted)
    places = torch.stack([torch.arange(2).view(2, 1).expand(2, 3), along], -1).int()
    same(only("scatter_nd", data=data, indices=places, updates=updates, mode=mode), wanted)
