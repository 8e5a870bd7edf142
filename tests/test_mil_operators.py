"""MIL's operators beside torch and NumPy, at the edges: fp16, masks, bounds, nothing at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mil_programs import only, run
from torch import Tensor

from slm_export.errors import InputError


def half(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float16)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def same(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("add", torch.add),
        ("sub", torch.sub),
        ("mul", torch.mul),
        ("real_div", torch.div),
        ("maximum", torch.maximum),
    ],
)
def test_fp16_is_float32_rounded_once(kind: str, function: Any) -> None:
    # All bit patterns, subnormals, infinities and NaN among them, each beside many others.
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).repeat(8)
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    same(only(kind, x=x, y=y), function(x.float(), y.float()).half())


EXACT: dict[str, Any] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "floor": torch.floor,
    "round": torch.round,
    "sign": torch.sign,
    "square": torch.square,
    "relu": torch.relu,
}


@pytest.mark.parametrize("kind", EXACT)
def test_every_fp16_alone(kind: str) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    x = x[~x.isnan()]
    same(only(kind, x=x), EXACT[kind](x.float()).half())


@pytest.mark.parametrize(
    ("kind", "operands", "expected"),
    [
        ("mul", {"x": half(60000), "y": half(-2)}, [-math.inf]),
        ("square", {"x": half(300)}, [math.inf]),
        ("exp", {"x": half(11, 12)}, [59874.0, math.inf]),
        ("reduce_sum", {"x": half(60000, 60000, -60000)}, 60000.0),
        ("reduce_mean", {"x": half(60000, 60000)}, 60000.0),
        ("reduce_l2_norm", {"x": half(300, 400)}, 500.0),
        ("matmul", {"x": half(300, 300, 1), "y": half(300, -300, 2)}, 2.0),
        ("linear", {"x": half(256, 256), "weight": torch.full((1, 2), 256.0).half()}, [math.inf]),
        ("cumsum", {"x": half(60000, 60000, -60000)}, [60000.0, math.inf, 60000.0]),
        ("log", {"x": half(0)}, [math.log(2**-149)]),
        ("rsqrt", {"x": half(0)}, [math.inf]),
        ("softmax", {"x": half(60000, 60000)}, [0.5, 0.5]),
    ],
)
def test_fp16_overflows_in_the_result_and_not_before(
    kind: str, operands: dict[str, Any], expected: Any
) -> None:
    same(only(kind, **operands), torch.tensor(expected).half())


def test_two_types_do_not_meet() -> None:
    with pytest.raises(InputError, match="of one type"):
        run("add", x=half(1), y=torch.ones(1))
    with pytest.raises(InputError, match="of one type"):
        run("concat", values=[half(1), torch.ones(1)], axis=0)


def test_a_masked_row_of_softmax_is_nan() -> None:
    made = only("softmax", x=torch.tensor([[-math.inf, -math.inf], [-math.inf, 1.0]]), axis=1)
    assert made[0].isnan().all()
    assert made[1].tolist() == [0, 1]


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_is_torch_s(mask: str | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 6)
    seen = torch.rand(3, 4, 5) > 0.3
    seen[..., 0] = True
    masks = {None: None, "bool": seen, "float": torch.where(seen, 0.0, -math.inf)}
    given = {} if mask is None else {"attn_mask": masks[mask]}
    made = only("scaled_dot_product_attention", query=query, key=key, value=value, **given)
    torch.testing.assert_close(made, F.scaled_dot_product_attention(query, key, value, masks[mask]))
    if mask == "bool":
        seen[:, 1] = False
        hidden = only("scaled_dot_product_attention", query=query, key=key, value=value, **given)
        assert hidden[:, :, 1].isnan().all()
        same(hidden[:, :, 2:], made[:, :, 2:])


@pytest.mark.parametrize(
    ("shapes", "mask"),
    [(((1, 4, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8)), None), (((1, 2, 2, 8),) * 3, (3, 1, 1, 2, 2))],
)
def test_attention_refuses_other_shapes(shapes: Any, mask: Any) -> None:
    query, key, value = (torch.zeros(shape) for shape in shapes)
    given = {} if mask is None else {"attn_mask": torch.zeros(mask)}
    with pytest.raises((InputError, RuntimeError)):
        run("scaled_dot_product_attention", query=query, key=key, value=value, **given)


def test_examples_of_the_pages() -> None:
    data, updates = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[5, 6, 7], [8, 9, 10]])
    made = only("scatter", data=data, indices=ints(1, 0), updates=updates, axis=0, mode="add")
    assert made.tolist() == [[9, 11, 13], [9, 11, 13]]
    one, two = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([[7, 8], [9, 10], [11, 12]])
    made = only("concat", values=[one, two], axis=0, interleave=True)
    assert made.tolist() == [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]
    shapes = [
        ((3,), -1, (1, 3)),
        ((3,), 1, (3, 1)),
        ((4, 3), -1, (4, 3)),
        ((2, 3, 2), -1, (6, 2)),
        ((5, 5, 2), 1, (5, 10)),
    ]
    for shape, axis, expected in shapes:
        assert only("flatten2d", x=torch.zeros(shape), axis=axis).shape == expected
    made = only(
        "reshape_like",
        x=torch.zeros(180, 1),
        ref_tensors=[torch.zeros(2, 3, 4), torch.zeros(1, 5, 6)],
        begins=list(ints(0, 1).unbind()),
        ends=list(ints(2, 0).unbind()),
        end_masks=[torch.tensor(False), torch.tensor(True)],
    )
    assert made.shape == (2, 3, 5, 6)
    assert only("round", x=torch.tensor([0.5, 1.5, -0.5])).tolist() == [0, 2, 0]
    assert only("squeeze", x=torch.zeros(2, 3, 4), axes=[0, 1]).shape == (2, 3, 4)


def test_what_coremltools_does_not_infer() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0]])
    values, indices = run("topk", x=x, k=-1)
    assert (values.tolist(), indices.tolist()) == ([[3, 2, 1]], [[0, 2, 1]])
    (values,) = run("topk", x=x, k=2, ascending=True, return_indices=False)
    assert values.tolist() == [[1, 2]]
    assert run("topk", x=x, k=1, output_indices_dtype="uint16")[1].dtype == torch.uint16
    assert only("cumsum", x=x, axis=1, exclusive=True).tolist() == [[0, 3, 4]]
    assert only("cumsum", x=x, axis=1, exclusive=True, reverse=True).tolist() == [[3, 2, 0]]
    made = only("one_hot", indices=ints(2, 0, -1), one_hot_vector_size=3, axis=0)
    assert made.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert made.dtype == torch.int32
    made = only(
        "one_hot",
        indices=ints(1),
        one_hot_vector_size=2,
        on_value=torch.tensor(5.0),
        off_value=torch.tensor(-1.0),
    )
    assert made.tolist() == [[-1, 5]]
    made = only(
        "dequantize", input=torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), scale=half(0.5, 2), axis=0
    )
    same(made, torch.tensor([[0.5, 1], [6, 8]]).half())


def test_casts_hold_to_the_range() -> None:
    x = torch.tensor([1.9, -1.9, 3e9, -math.inf, math.nan, 300])
    assert only("cast", x=x, dtype="int32").tolist() == [1, -1, (1 << 31) - 1, -(1 << 31), 0, 300]
    assert only("cast", x=x, dtype="int8").tolist() == [1, -1, 127, -128, 0, 127]
    assert only("cast", x=x, dtype="uint16").tolist() == [1, 0, 65535, 0, 0, 300]
    assert only("cast", x=x, dtype="fp16").tolist()[2] == math.inf
    assert only("cast", x=x, dtype="bool").tolist() == [True] * 6
    with pytest.raises(InputError, match="'int33'"):
        run("cast", x=x, dtype="int33")


def test_products() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 6), torch.randn(8, 2, 3)
    made = only(
        "conv",
        x=x,
        weight=weight,
        pad_type="custom",
        pad=[1, 2],
        strides=[2],
        dilations=[2],
        groups=2,
        bias=torch.ones(8),
    )
    torch.testing.assert_close(made, F.conv1d(F.pad(x, (1, 2)), weight, torch.ones(8), 2, 0, 2, 2))
    image, kernel = torch.randn(1, 4, 5, 7), torch.randn(3, 4, 1, 1)
    made = only("conv", x=image, weight=kernel, pad_type="valid")
    torch.testing.assert_close(made, F.conv2d(image, kernel))
    for type in ("same", "same_lower"):
        made = only("conv", x=image, weight=torch.randn(3, 4, 2, 3), pad_type=type, strides=[2, 2])
        assert made.shape == (1, 3, 3, 4)
    one, two = torch.randn(2, 3, 4, 5), torch.randn(2, 5, 1, 6)
    made = only("einsum", values=[one, two], equation="nchw,nwhu->nchu")
    torch.testing.assert_close(made, (one.transpose(1, 2) @ two.transpose(1, 2)).transpose(1, 2))
    assert only("linear", x=ints(1, 2), weight=torch.tensor([[3, 4]], dtype=torch.int32)).tolist() == [11]
    with pytest.raises(InputError, match="a matrix"):
        run("linear", x=torch.zeros(1, 3), weight=torch.zeros(2, 4))


def test_normalizations() -> None:
    torch.manual_seed(0)
    x, gamma, beta = torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3)
    torch.testing.assert_close(
        only("instance_norm", x=x, gamma=gamma, beta=beta), F.instance_norm(x, weight=gamma, bias=beta)
    )
    mean, variance = torch.randn(3), torch.rand(3)
    torch.testing.assert_close(
        only(
            "batch_norm",
            x=x,
            mean=mean,
            variance=variance,
            gamma=gamma,
            beta=beta,
            epsilon=torch.tensor(1e-3),
        ),
        F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3),
    )
    torch.testing.assert_close(
        only("local_response_norm", x=x, size=3, alpha=torch.tensor(0.5)), F.local_response_norm(x, 3, 0.5)
    )
    weight = torch.randn(3, 5)
    made = only("layer_norm", x=x.half(), axes=[1, 3], gamma=weight, epsilon=half(1e-3)[0])
    moved = F.layer_norm(x.half().float().movedim(2, 1), (3, 5), weight, eps=float(half(1e-3)[0])).movedim(
        1, 2
    )
    torch.testing.assert_close(made, moved.half(), rtol=1e-3, atol=1e-3)
    alpha = torch.rand(3)
    inner = F.softplus(x * alpha.view(3, 1, 1))
    made = only("softplus_parametric", x=x, alpha=gamma, beta=alpha)
    torch.testing.assert_close(made, gamma.view(3, 1, 1) * inner)


def test_nothing_at_all() -> None:
    empty = torch.zeros(0, 3)
    assert only("add", x=empty, y=torch.ones(3)).shape == (0, 3)
    assert only("reduce_sum", x=empty, axes=[0]).tolist() == [0, 0, 0]
    assert only("softmax", x=empty).shape == (0, 3)
    assert only("linear", x=empty, weight=torch.ones(2, 3)).shape == (0, 2)
    assert only("concat", values=[empty, torch.ones(1, 3)], axis=0).shape == (1, 3)
    assert only("cumsum", x=empty, axis=0, exclusive=True).shape == (0, 3)
    assert only("pad", x=empty, pad=[1, 1, 0, 0], constant_val=2.0).tolist() == [[2, 2, 2]] * 2
    assert only("range_1d", start=ints(3)[0], end=ints(3)[0], step=ints(1)[0]).shape == (0,)
    assert only("non_zero", x=empty).shape == (0, 2)
    with pytest.raises((InputError, RuntimeError, IndexError)):
        run("reduce_max", x=empty, axes=[0])


@pytest.mark.parametrize(
    ("kind", "operands"),
    [
        ("fill", {"shape": [1 << 20, 1 << 20]}),
        ("fill", {"shape": [-1]}),
        ("tile", {"x": torch.zeros(1, 1), "reps": [1 << 40, 1]}),
        ("range_1d", {"start": ints(0)[0], "end": ints(1)[0], "step": ints(0)[0]}),
        ("range_1d", {"start": half(0)[0], "end": half(math.inf)[0], "step": half(1)[0]}),
        ("one_hot", {"indices": ints(0), "one_hot_vector_size": 1 << 40}),
        ("pad", {"x": torch.zeros(1), "pad": [1 << 40, 0]}),
        ("pad", {"x": torch.zeros(3), "pad": [3, 0], "mode": "reflect"}),
        ("pad", {"x": torch.zeros(3), "pad": [-1, 0]}),
        ("split", {"x": torch.zeros(3), "axis": 0, "num_splits": 2}),
        ("softmax", {"x": torch.zeros(3), "axis": 1}),
        ("expand_dims", {"x": torch.zeros(3), "axes": [0, 0]}),
        ("logical_and", {"x": ints(1), "y": ints(1)}),
    ],
)
def test_what_no_program_can_mean(kind: str, operands: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        run(kind, **operands)


def test_parameters_are_known() -> None:
    with pytest.raises(InputError, match="has no parameter alfa"):
        run("clip", x=half(1), alpha=half(1), alfa=half(1), beta=half(1))
    with pytest.raises(InputError, match="lacks the parameter beta"):
        run("clip", x=half(1), alpha=half(1))
    with pytest.raises(InputError, match="in_place"):
        run("slice_update", x=half(1), update=half(1), begin=[0], end=[1], in_place=True)
