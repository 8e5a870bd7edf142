"""The learned-rounding pass: nearer to the source's blocks than gptq, never farther, and repeatable."""

from __future__ import annotations

import pytest
import small_models
import torch
from small_models import random_text

from slm_export.bundles.finished import Finished
from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.graph.model import build_reference
from slm_export.optimizers import learned_rounding
from slm_export.optimizers.gptq import Gptq
from slm_export.optimizers.learned_rounding import LearnedRounding
from slm_export.recipe import unaccounted
from slm_export.weights import CODE_RANGE, Quantized, grid_scale


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text() -> Calibration:
    return random_text(windows=400)


def test_it_is_nearer_than_what_it_began_with(llama, text):
    began = Gptq().run(llama, Workbench(calibration=text)).checkpoint
    result = LearnedRounding(steps=100, code_rate=0.01).run(llama, Workbench(calibration=text))
    made = result.checkpoint
    assert block_error(llama, made, text) < 0.95 * block_error(llama, began, text)
    assert unaccounted(llama, made, result.skipped) == []
    for name, weight in made.weights.items():
        other = began.weights[name]
        assert (weight.shape, weight.bytes) == (other.shape, other.bytes)
        if isinstance(weight, Quantized):
            assert torch.equal(weight.scales, grid_scale(weight.scales))
            low, high = CODE_RANGE[weight.bits]
            assert low <= int(weight.codes().min()) <= int(weight.codes().max()) <= high


def block_error(source: Checkpoint, other: Checkpoint, text: Calibration) -> float:
    """Return the mean squared error of the last block's output on windows that are not calibrated on."""
    made = []
    for checkpoint in (source, other):
        model = build_reference(checkpoint)
        outputs: list[torch.Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda _, args, output, o=outputs: o.append(output))
        with torch.no_grad():
            model(input_ids=torch.tensor(text.held_out))
        made.append(outputs[0])
    return float((made[0] - made[1]).square().mean())


@pytest.mark.parametrize("options", [{"steps": 0}, {"code_rate": 3.0, "rate": 0.5, "steps": 10}])
def test_what_learning_makes_worse_is_not_kept(llama, text, options):
    """No steps, or far too large ones: what gptq made is what comes out."""
    began = Gptq().run(llama, Workbench(calibration=text)).checkpoint
    made = LearnedRounding(**options).run(llama, Workbench(calibration=text)).checkpoint
    for name, weight in began.weights.items():
        assert torch.equal(weight.float32(), made.weights[name].float32()), name


class Killed(Exception):
    """What a test ends a pass with."""


def test_a_killed_pass_goes_on_and_ends_with_the_same_bits(llama, text, tmp_path, monkeypatch):
    step = LearnedRounding(steps=5)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = step.run(llama, Workbench(Finished(tmp_path / "whole"), text)).checkpoint
    expected_values = {name: weight.float32() for name, weight in expected.weights.items()}
    blocks = []
    whole = learned_rounding.LearnedRounding._learn

    def dying(self, block, latents):
        blocks.append(block.index)
        if blocks == [0, 1]:
            raise Killed
        return whole(self, block, latents)

    monkeypatch.setattr(learned_rounding.LearnedRounding, "_learn", dying)
    with pytest.raises(Killed):
        step.run(llama, Workbench(Finished(tmp_path / "killed"), text))
    made = step.run(llama, Workbench(Finished(tmp_path / "killed"), text)).checkpoint
    assert blocks == [0, 1, 1]
    for name, values in expected_values.items():
        assert torch.equal(values, made.weights[name].float32()), name


@pytest.mark.parametrize("options", [{"steps": -1}, {"code_rate": -0.1}, {"rate": -1.0}, {"group": 48}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(InputError, match=r"^learned-rounding: "):
        LearnedRounding(**options)
