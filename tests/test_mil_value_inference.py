"""MIL's operators beside coremltools' own idea of them, where it has one: what an operator makes of constants."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from mil_programs import operands, run

pytest.importorskip("coremltools")

GENERATOR = np.random.default_rng(0)
F32 = GENERATOR.normal(size=(2, 3, 4)).astype(np.float32)
POSITIVE = np.abs(F32) + np.float32(0.5)
UNIT = np.tanh(F32)
INTS = GENERATOR.integers(-9, 10, size=(2, 3, 4)).astype(np.int32)
NOT_ZERO = np.where(INTS[::-1, ::-1] == 0, 2, INTS[::-1, ::-1]).astype(np.int32)
FLAGS = F32 > 0
ROW = np.array([0.5, -1.0, 2.0, 3.0], dtype=np.float32)

FLOAT_UNARY = [
    "ceil",
    "cos",
    "cosh",
    "erf",
    "exp",
    "exp2",
    "floor",
    "sign",
    "sin",
    "sinh",
    "square",
    "tan",
    "tanh",
    "abs",
    "atan",
    "round",
    "relu",
    "relu6",
    "sigmoid",
    "softplus",
    "softsign",
]
CASES: list[tuple[str, int, dict[str, Any]]] = [
    *((kind, 17, {"x": F32}) for kind in FLOAT_UNARY),
    *((kind, 17, {"x": UNIT}) for kind in ("acos", "asin", "atanh")),
    *((kind, 17, {"x": POSITIVE}) for kind in ("sqrt",)),
    *((kind, 17, {"x": POSITIVE, "epsilon": 1e-3}) for kind in ("log", "rsqrt", "inverse")),
    *((kind, 17, {"x": INTS}) for kind in ("abs", "sign", "square")),
    *(
        (kind, 17, {"x": x, "y": y})
        for kind in [
            "add",
            "sub",
            "mul",
            "maximum",
            "minimum",
            "equal",
            "not_equal",
            "greater",
            "greater_equal",
            "less",
            "less_equal",
            "floor_div",
            "mod",
            "real_div",
        ]
        for x, y in ((F32, ROW), (INTS, NOT_ZERO), (ROW, F32))
    ),
    ("pow", 17, {"x": POSITIVE, "y": F32}),
    *((kind, 17, {"x": FLAGS, "y": ~FLAGS[:1]}) for kind in ("logical_and", "logical_or", "logical_xor")),
    ("logical_not", 17, {"x": FLAGS}),
    ("clip", 17, {"x": F32, "alpha": -0.5, "beta": 0.5}),
    ("threshold", 17, {"x": F32, "alpha": 0.25}),
    ("leaky_relu", 17, {"x": F32, "alpha": 0.1}),
    ("elu", 17, {"x": F32, "alpha": 0.7}),
    ("linear_activation", 17, {"x": F32, "alpha": 2.0, "beta": -1.0}),
    ("scaled_tanh", 17, {"x": F32, "alpha": 2.0, "beta": 0.5}),
    ("sigmoid_hard", 17, {"x": F32, "alpha": 0.4, "beta": 0.5}),
    ("clamped_relu", 17, {"x": F32, "alpha": 0.3, "beta": 0.8}),
    ("thresholded_relu", 17, {"x": F32, "alpha": 0.2}),
    ("prelu", 17, {"x": F32[None], "alpha": np.array([0.1, 0.2], np.float32)}),
    *(
        ("gelu", 17, {"x": F32, "mode": mode})
        for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    ),
    *(("softmax", 17, {"x": F32, "axis": axis}) for axis in (-1, 0, 1)),
    *(
        ("cast", 17, {"x": x, "dtype": dtype})
        for x in (F32 * 3, INTS, FLAGS)
        for dtype in ("int32", "fp16", "fp32", "bool")
    ),
    *(("cast", 17, {"x": np.abs(INTS), "dtype": dtype}) for dtype in ("int8", "uint8", "int16", "uint16")),
    ("linear", 17, {"x": F32[0], "weight": F32[1], "bias": np.array([1, 2, 3], np.float32)}),
    ("matmul", 17, {"x": F32, "y": F32, "transpose_x": False, "transpose_y": True}),
    ("matmul", 17, {"x": F32, "y": F32, "transpose_x": True}),
    ("matmul", 17, {"x": ROW, "y": F32, "transpose_y": True}),
    ("layer_norm", 17, {"x": F32, "axes": [-1], "gamma": ROW, "beta": ROW, "epsilon": 1e-3}),
    ("layer_norm", 17, {"x": F32, "axes": [1, 2], "epsilon": 1e-3}),
    ("l2_norm", 17, {"x": F32, "epsilon": 1e-3}),
    *(
        (f"reduce_{kind}", 17, {"x": POSITIVE, "axes": axes, "keep_dims": keep})
        for kind in [
            "sum",
            "mean",
            "max",
            "min",
            "prod",
            "l1_norm",
            "l2_norm",
            "log_sum",
            "log_sum_exp",
            "sum_square",
        ]
        for axes, keep in (([-1], True), ([0, 2], False), ([1], False))
    ),
    *(
        (f"reduce_{kind}", 17, {"x": INTS, "axes": [1], "keep_dims": True})
        for kind in ("sum", "max", "min", "prod")
    ),
    *(
        (f"reduce_{kind}", 17, {"x": F32, "axis": 1, "keep_dims": keep})
        for kind in ("argmax", "argmin")
        for keep in (True, False)
    ),
    # Its exclusive sums fail in NumPy 2.
    *(
        ("cumsum", 17, {"x": x, "axis": axis, "reverse": back})
        for x in (F32, INTS)
        for axis, back in ((0, False), (1, True))
    ),
    *(
        ("band_part", 17, {"x": F32, "lower": low, "upper": up})
        for low, up in ((-1, 0), (0, -1), (1, 1), (0, 0), (-1, -1))
    ),
    ("argsort", 17, {"x": F32, "axis": 1, "ascending": True}),
    ("argsort", 17, {"x": F32, "axis": -1}),
    ("topk", 17, {"x": F32, "k": 2, "axis": -1}),
    ("topk", 17, {"x": F32, "k": 1, "axis": 1, "ascending": True}),
    ("concat", 17, {"values": [F32, F32 + 1], "axis": -2}),
    ("concat", 17, {"values": [np.int32(1), np.int32(7)], "axis": 0}),
    ("stack", 17, {"values": [F32, F32 + 1], "axis": 1}),
    ("split", 17, {"x": F32, "axis": -1, "num_splits": 2}),
    ("split", 17, {"x": F32, "axis": 2, "split_sizes": [1, 3]}),
    ("expand_dims", 17, {"x": F32, "axes": [0, -1]}),
    ("expand_dims", 17, {"x": F32, "axes": [1, 2]}),
    ("squeeze", 17, {"x": F32[:1, :, :1], "axes": [0, 2]}),
    ("squeeze", 17, {"x": F32[:1, :, :1]}),
    ("transpose", 17, {"x": F32, "perm": [-1, 0, 1]}),
    ("reverse", 17, {"x": F32, "axes": [0, -1]}),
    ("reverse", 17, {"x": F32}),
    ("reshape", 15, {"x": F32, "shape": [4, 0, -1]}),
    ("reshape", 17, {"x": F32, "shape": [0, -1, 0]}),
    ("tile", 17, {"x": F32, "reps": [1, 2, 3]}),
    ("tile", 17, {"x": F32[:1], "reps": [5, 1, 1]}),
    ("pad", 17, {"x": F32, "pad": [1, 0, 2, 1], "mode": "constant", "constant_val": 9.0}),
    ("pad", 17, {"x": F32, "pad": [1, 2], "mode": "reflect"}),
    ("pad", 17, {"x": F32, "pad": [1, 2], "mode": "replicate"}),
    ("fill", 17, {"shape": [2, 3], "value": 1.5}),
    ("fill_like", 17, {"ref_tensor": F32, "value": 2}),
    ("range_1d", 17, {"start": 1, "end": 9, "step": 3}),
    ("range_1d", 17, {"start": 5.0, "end": 1.0, "step": -1.5}),
    ("shape", 17, {"x": F32}),
    ("non_zero", 17, {"x": INTS}),
    ("select", 17, {"cond": FLAGS, "a": F32, "b": F32 + 1}),
    ("flatten2d", 17, {"x": F32, "axis": -1}),
    ("identity", 17, {"x": F32}),
    ("gather", 15, {"x": F32, "indices": np.array([-1, 0], np.int32), "axis": 1}),
    ("gather", 17, {"x": F32, "indices": np.array([[2, 0], [1, 1]], np.int32), "axis": -1}),
    ("gather", 17, {"x": INTS, "indices": np.int32(1), "axis": 0}),
    ("gather", 17, {"x": F32, "indices": np.array([[2, 0], [1, 1]], np.int32), "axis": 1, "batch_dims": 1}),
    ("gather_along_axis", 17, {"x": F32, "indices": np.argsort(F32, axis=1).astype(np.int32), "axis": 1}),
    (
        "slice_by_index",
        17,
        {
            "x": F32,
            "begin": [0, 1, 3],
            "end": [2, 0, 0],
            "stride": [1, 1, -2],
            "end_mask": [False, True, False],
        },
    ),
    (
        "slice_by_index",
        17,
        {"x": F32, "begin": [1, 0, -3], "end": [0, 3, -1], "squeeze_mask": [True, False, False]},
    ),
    ("slice_by_size", 17, {"x": F32, "begin": [0, 1, 2], "size": [2, -1, 1]}),
    ("quantize", 17, {"input": F32 * 90, "scale": 0.5, "zero_point": np.int8(3), "output_dtype": "int8"}),
]


def inferred(kind: str, opset: int, given: dict[str, Any]) -> list[Any] | None:
    """What coremltools computes; None where it does not.

    Left out because it departs from its own page: ``topk`` with k -1 (all but the last), ``concat`` interleaved (not).
    """
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    made: list[Any] = []

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=getattr(ct.target, f"iOS{opset}"))
    def program(x: Any) -> Any:
        # A copy: some of its operators change their operands.
        result = getattr(mb, kind)(**copy.deepcopy(given))
        made.extend(result if isinstance(result, (list, tuple)) else [result])
        return mb.identity(x=x)

    return None if any(var.val is None for var in made) else [np.asarray(var.val) for var in made]


@pytest.mark.parametrize(
    ("kind", "opset", "given"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_as_coremltools_infers(kind: str, opset: int, given: dict[str, Any]) -> None:
    expected = inferred(kind, opset, given)
    made = run(kind, opset, **operands(kind, opset, given))
    assert expected is not None, "it no longer infers this value: test it elsewhere"
    assert len(made) == len(expected)
    for tensor, array in zip(made, expected, strict=True):
        assert list(tensor.shape) == list(array.shape)
        # MIL's own types carry more than NumPy's scalars do; kinds have to agree.
        assert tensor.is_floating_point() == np.issubdtype(array.dtype, np.floating)
        torch.testing.assert_close(
            tensor.double(), torch.from_numpy(array.astype(np.float64)), rtol=2e-6, atol=2e-6
        )
