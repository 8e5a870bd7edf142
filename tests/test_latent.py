"""Matrices on the grid with numbers behind them that can be learned."""

from __future__ import annotations

import pytest
import torch
from checkpoints import normal

from slm_export.compression.latent import Latent
from slm_export.optimizers.group_quantize import quantize
from slm_export.weights import CODE_RANGE, grid_scale

KINDS = ((4, 32), (8, 64))


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("given", [True, False])
def test_it_begins_as_the_matrix_it_was_given(bits, group, given):
    values = normal(8, 64)
    weight = quantize(values, bits, group)
    latent = Latent(weight, 3 * values if given else None)  # far from it, codes are still those of the matrix
    assert torch.equal(latent.weight().packed, weight.packed)
    assert torch.equal(latent.weight().scales, weight.scales)
    assert torch.equal(latent.matrix(), weight.float32())


def test_what_is_computed_with_is_what_is_kept():
    latent = Latent(quantize(normal(8, 64), 4, 32))
    with torch.no_grad():
        latent.codes += 0.4 * normal(8, 64, seed=1)
        latent.factors += 0.1 * normal(8, 2, seed=2)
    made = latent.weight()
    assert torch.equal(made.scales, grid_scale(made.scales))
    assert torch.equal(latent.matrix(), made.float32())


def test_gradients_are_those_of_the_matrix_without_rounding():
    latent, weights = Latent(quantize(normal(8, 64), 4, 32)), normal(8, 64, seed=3)
    (latent.matrix() * weights).sum().backward()
    made = latent.weight()
    steps = made.scales.repeat_interleave(32, dim=1)
    assert torch.allclose(latent.codes.grad, weights * steps)
    expected = (weights * made.codes() * steps).view(8, 2, 32).sum(-1)
    assert torch.allclose(latent.factors.grad, expected, rtol=1e-5, atol=1e-6)


def test_codes_stay_in_their_range_and_can_return():
    latent = Latent(quantize(normal(8, 64), 4, 32))
    with torch.no_grad():
        latent.codes += 100
        latent.factors -= 100
    latent.clip()
    low, high = CODE_RANGE[4]
    assert (latent.weight().codes() == high).all()
    assert (latent.weight().scales > 0).all()
    with torch.no_grad():
        latent.codes -= 1
    assert (latent.weight().codes() == high - 1).all()
    assert low < high


def test_what_was_nearly_another_code_begins_near_it():
    weight = quantize(torch.tensor([[0.45] + [0.0] * 30 + [7.0]]), 4, 32)
    assert weight.scales.item() == 1
    assert Latent(weight, torch.tensor([[0.45] + [0.0] * 30 + [7.0]])).codes[0, 0].item() == pytest.approx(
        0.45
    )
