"""The gptq pass: what it costs on text, what becomes of which weight, and going on after a kill."""

from __future__ import annotations

import pytest
import small_models
import torch
from small_models import divergence, random_text
from torch import Tensor
from transformers import AlbertConfig, AlbertModel

from slm_export.bundles.finished import Finished
from slm_export.checkpoint import Checkpoint
from slm_export.compression.blockwise import Block
from slm_export.compression.calibration import Calibration
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError, MachineError
from slm_export.optimizers import gptq
from slm_export.optimizers.gptq import Gptq
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.recipe import make_pass, unaccounted
from slm_export.source.load import load_checkpoint
from slm_export.weights import Dense, Quantized


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text() -> Calibration:
    return random_text()


@pytest.mark.parametrize("bits", [4, 8])
def test_text_is_worth_a_third_of_the_divergence(llama, text, bits):
    plain = GroupQuantize(bits=bits).run(llama).checkpoint
    made = Gptq(bits=bits).run(llama, Workbench(calibration=text)).checkpoint
    assert divergence(llama, made, text) < 0.67 * divergence(llama, plain, text)
    assert made.bytes == plain.bytes


def test_a_layer_is_measured_on_what_the_rounded_layers_before_it_make(llama, text, monkeypatch):
    rounded_before: list[tuple[str, set[str]]] = []
    measure = Block.gram

    def watched(block: Block, name: str) -> Tensor:
        changed = {
            other.rpartition(".weight")[0].rpartition(".")[2]
            for other, linear in block.linears.items()
            if not torch.equal(linear.matrix, linear.source.float32())
        }
        rounded_before.append((name.split(".")[-2], changed))
        return measure(block, name)

    monkeypatch.setattr(Block, "gram", watched)
    Gptq().run(llama, Workbench(calibration=text))
    attention = {"q_proj", "k_proj", "v_proj"}
    assert rounded_before == 2 * [
        ("q_proj", set()),
        ("o_proj", attention),
        ("gate_proj", attention | {"o_proj"}),
        ("down_proj", attention | {"o_proj", "gate_proj", "up_proj"}),
    ]


def test_every_weight_is_changed_or_skipped_with_a_reason(llama, text):
    for options in ({"bits": 16}, {"bits": 32, "embedding_bits": 4}, {"bits": 8}):
        result = Gptq(**options).run(llama, Workbench(calibration=text))
        assert unaccounted(llama, result.checkpoint, result.skipped) == []
    plain = GroupQuantize(bits=4, head_bits=16).run(llama)
    made = Gptq(bits=4, head_bits=16).run(llama, Workbench(calibration=text))
    assert made.skipped == plain.skipped
    for name, weight in plain.checkpoint.weights.items():
        other = made.checkpoint.weights[name]
        assert (type(other), other.shape, other.bytes) == (type(weight), weight.shape, weight.bytes)


def test_single_matrices_have_bits_and_groups_of_their_own(llama, text):
    step = make_pass(
        "gptq",
        {"bits_by_tensor": {"*.v_proj.weight": 8, "*.0.mlp.*": 16}, "group_by_tensor": {"*.q_proj.*": 64}},
        "phone.toml",
    )
    made = step.run(llama, Workbench(calibration=text)).checkpoint.weights
    assert isinstance(made["model.layers.0.mlp.up_proj.weight"], Dense)
    bits = {name: (w.bits, w.group) for name, w in made.items() if isinstance(w, Quantized)}
    assert bits["model.layers.1.self_attn.v_proj.weight"] == (8, 64)
    assert bits["model.layers.1.self_attn.q_proj.weight"] == (4, 64)
    assert bits["model.layers.1.mlp.up_proj.weight"] == (4, 32)


def test_a_model_that_is_no_sequence_is_rounded_without_text_and_that_is_said(tmp_path, text):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    AlbertModel(AlbertConfig(vocab_size=50, embedding_size=32, **sizes)).save_pretrained(tmp_path)
    albert = load_checkpoint(tmp_path)
    result = Gptq().run(albert, Workbench(calibration=text))
    assert result.notes == (
        "matrices were rounded without calibration: its blocks are not run one after the other, each once",
    )
    plain = GroupQuantize().run(albert).checkpoint
    for name, weight in plain.weights.items():
        if isinstance(weight, Quantized):
            assert torch.equal(weight.packed, result.checkpoint.weights[name].packed)


class Killed(Exception):
    """What a test ends a pass with."""


def test_a_killed_pass_goes_on_and_ends_with_the_same_bits(llama, text, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = Gptq().run(llama, Workbench(Finished(tmp_path / "whole"), text)).checkpoint
    rounded: list[tuple[int, ...]] = []
    whole = gptq.round_matrix

    def dying(values, *rest):
        if len(rounded) == 10:  # three matrices into the second block of seven
            raise Killed
        rounded.append(tuple(values.shape))
        return whole(values, *rest)

    monkeypatch.setattr(gptq, "round_matrix", dying)
    with pytest.raises(Killed):
        Gptq().run(llama, Workbench(Finished(tmp_path / "killed"), text))
    rounded.clear()
    keeper = Finished(tmp_path / "killed")
    made = Gptq().run(llama, Workbench(keeper, text)).checkpoint
    assert len(rounded) == 7, "the first block was finished"
    assert all(".layers.0." in name for name in keeper.reused)
    for name, weight in expected.weights.items():
        other = made.weights[name]
        assert torch.equal(weight.float32(), other.float32()), name


def test_a_finished_weight_that_cannot_be_read_is_told_and_the_next_run_begins_anew(llama, text, tmp_path):
    made = Gptq().run(llama, Workbench(Finished(tmp_path), text)).checkpoint
    first = {name: weight.float32() for name, weight in made.weights.items()}
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"torn")
    with pytest.raises(MachineError, match="cannot be read; run it again"):
        Gptq().run(llama, Workbench(Finished(tmp_path), text))
    again = Gptq().run(llama, Workbench(Finished(tmp_path), text)).checkpoint
    for name, values in first.items():
        assert torch.equal(values, again.weights[name].float32()), name


def test_it_needs_text(llama):
    with pytest.raises(InputError, match="gptq: needs calibration text"):
        Gptq().run(llama)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"damping": 0.0}, "damping must be above 0 and at most 1, not 0.0"),
        ({"rounds": 21}, "rounds must be from 0 to 20, not 21"),
        ({"bits": 5}, "bits must be 4, 8, 16 or 32, not 5"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, problem):
    with pytest.raises(InputError, match=f"^gptq: {problem}"):
        Gptq(**options)
