"""The oracle's own parts against torch's plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import dense, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slm_export.exporters.executorch_dialect import xnnpack_rounding
from slm_export.graph import dialect
from slm_export.graph.dialect import ReferenceDialect, fake_quantize_per_token
from slm_export.optimizers.group_quantize import quantize
from slm_export.weights import Weight

PLAIN = ReferenceDialect()
AS_EXPORTED = ReferenceDialect(xnnpack_rounding)

WEIGHTS = {
    "float32": dense(normal(48, 64)),
    "bfloat16": dense(normal(48, 64).to(torch.bfloat16)),
    "float16": dense(normal(48, 64).to(torch.float16)),
    "int4": quantize(normal(48, 64), 4, 32),
    "int8": quantize(normal(48, 64), 8, 64),
}


@pytest.fixture(params=WEIGHTS)
def weight(request: pytest.FixtureRequest) -> Weight:
    return WEIGHTS[request.param]


@pytest.fixture(params=[1, 7, 1 << 22], ids=lambda rows: f"blocks of {rows}")
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "_BLOCK", request.param * 64)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Return (6, 32) of any magnitude: around 0, or all on one side of it."""
    values = normal(6, 32, seed=draw(st.integers(0, 1 << 16)))
    return (values + draw(st.sampled_from([0.0, 3.0, -40.0]))) * 2.0 ** draw(st.integers(-20, 20))


def as_executorch_does(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x after quantized_decomposed's round trip, and the step of each row."""
    import torch.ao.quantization.fx._decomposed

    ops: Any = torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    made = ops.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)
    return made, scale.to(torch.float32)


@given(rows())
def test_activations_are_rounded_within_one_step_of_executorch(x):
    expected, step = as_executorch_does(x)
    steps = (fake_quantize_per_token(x) - expected).abs() / step
    assert (steps <= 1.001).all()
    # Dividing by a step and multiplying by its inverse round apart only where a value is half-way between codes.
    # ExecuTorch's reference has no step below float32's epsilon; XNNPACK, which is followed here, has.
    assert (steps[step[:, 0] > 1.2e-7] <= 0.001).float().sum() >= 0.95 * (step > 1.2e-7).sum() * 32


@given(rows())
def test_activations_move_by_one_step_at_most_and_mostly_by_half(x):
    step = (x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)).unsqueeze(-1) / 255
    error = (fake_quantize_per_token(x) - x).abs() / step
    # Only a value at the end of the range can lose more: its code is clamped after the zero point is rounded.
    assert (error <= 1.001).all()
    assert ((error <= 0.501).float().mean(-1) >= 0.9).all()


@given(rows())
def test_each_row_has_its_own_scale_and_256_values(x):
    whole = fake_quantize_per_token(x)
    assert torch.equal(whole, torch.stack([fake_quantize_per_token(row) for row in x]))
    fine = normal(4096)
    assert len(fake_quantize_per_token(fine).unique()) <= 256


def test_zero_stays_zero():
    x = torch.tensor([[0.0, 5.0, 3.0], [0.0, -5.0, -3.0], [0.0, 0.0, 0.0]])
    made = fake_quantize_per_token(x)
    assert (made[:, 0] == 0).all()
    assert (made[2] == 0).all()


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("bias", [None, normal(48, seed=3)], ids=["plain", "bias"])
def test_a_streamed_linear_layer_is_a_linear_layer(weight, bias):
    x = normal(2, 5, 64, seed=1)
    part = PLAIN.linear(weight, bias)
    assert torch.allclose(part(x), F.linear(x, weight.float32(), bias), atol=1e-5, rtol=1e-5)
    assert (part.in_features, part.out_features) == (64, 48)
    assert not list(part.parameters())
    assert not list(part.buffers())


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("shape", [(1,), (2, 5), (0,)], ids=str)
def test_a_streamed_embedding_is_a_look_up(weight, shape):
    ids = torch.randint(0, 48, shape, generator=torch.Generator().manual_seed(0))
    for reference in (PLAIN, AS_EXPORTED):
        assert torch.equal(reference.embedding(weight)(ids), F.embedding(ids, weight.float32()))


def test_activations_are_quantized_where_the_weights_are():
    x = normal(3, 64, seed=1)
    expected = {
        "float32": x,
        "bfloat16": x,
        "float16": x.to(torch.float16).to(torch.float32),
        "int4": fake_quantize_per_token(x),
        "int8": fake_quantize_per_token(x),
    }
    for name, made in WEIGHTS.items():
        found = AS_EXPORTED.linear(made, None)(x)
        assert torch.allclose(found, F.linear(expected[name], made.float32()), atol=1e-5), name


def test_the_oracle_has_no_cache():
    with pytest.raises(AssertionError):
        PLAIN.cached_attention(None, None)  # type: ignore[arg-type]
