"""The recover pass: nearer to the source on text that it did not learn from, never farther, on the same grid."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import small_models
import torch
import transformers
from checkpoints import normal
from small_models import divergence, random_text, saved

from slm_export.bundles.finished import Finished
from slm_export.checkpoint import Checkpoint, Vocabulary
from slm_export.compression.adapter import Adapter
from slm_export.compression.calibration import Calibration
from slm_export.compression.distillation import Teacher
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.graph.model import build_reference
from slm_export.optimizers import recover
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.recover import Recover
from slm_export.recipe import unaccounted
from slm_export.weights import CODE_RANGE, Dense, Quantized, grid_scale


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rounded(llama: Checkpoint) -> Checkpoint:
    return GroupQuantize().run(llama).checkpoint


@pytest.fixture(scope="module")
def text() -> Calibration:
    return random_text(windows=160)


SHORT = {"steps": 40, "tokens": 512}


def test_it_is_nearer_to_the_source(llama, rounded, text):
    work = Workbench(calibration=text)
    before = divergence(llama, rounded, text)
    result = Recover(**SHORT).run(rounded, work)
    made = result.checkpoint
    assert divergence(llama, made, text) < 0.5 * before
    assert unaccounted(rounded, made, result.skipped) == []
    for name, weight in rounded.weights.items():
        other = made.weights[name]
        assert (type(other), other.shape, other.bytes) == (type(weight), weight.shape, weight.bytes), name
        if isinstance(other, Quantized):
            assert torch.equal(other.scales, grid_scale(other.scales))
            low, high = CODE_RANGE[other.bits]
            assert low <= int(other.codes().min()) <= int(other.codes().max()) <= high
    vectors = Recover(code_rate=0.0, **SHORT).run(rounded, work).checkpoint
    assert divergence(llama, vectors, text) < 0.9 * before
    for name, weight in rounded.weights.items():
        if isinstance(weight, Quantized):
            assert torch.equal(weight.packed, vectors.weights[name].packed), "codes turned, at a rate of 0"


def test_the_loss_that_is_told_is_the_divergence_on_held_out_windows(llama, rounded, text):
    (note,) = Recover(steps=1).run(rounded, Workbench(calibration=text)).notes
    said = float(note.split()[4])
    assert said == pytest.approx(divergence(llama, rounded, text), abs=2e-5)


def test_what_learning_makes_worse_is_not_kept(rounded, text):
    made = Recover(steps=8, code_rate=3.0, rate=0.5).run(rounded, Workbench(calibration=text)).checkpoint
    for name, weight in rounded.weights.items():
        assert torch.equal(weight.float32(), made.weights[name].float32()), name


def damaged(source: Checkpoint, rank: int) -> Checkpoint:
    """Return a model whose linear layers lack what an adapter of a rank can give back; 0: rows of another size."""
    made = {}
    for index, (name, weight) in enumerate(source.weights.items()):
        if source.roles[name] == "linear":
            (out, columns), values = weight.shape, weight.float32()
            if rank:
                wrong = normal(out, rank, seed=index) @ normal(rank, columns, seed=index + 1)
                values = values + 0.5 * values.norm() / wrong.norm() * wrong
            else:
                values = values * (1 + 0.2 * normal(out, 1, seed=index))
            made[name] = Dense(weight.shape, torch.float32, partial(torch.clone, values))
    return source.with_weights(made)


@pytest.mark.parametrize("rank", [0, 2])
def test_matrices_of_floats_are_won_back_without_a_trace(llama, text, rank):
    """Shapes, types and sizes are as before."""
    before = damaged(llama, rank)
    result = Recover(rank=rank, rank_rate=0.02, rate=0.02, **SHORT).run(before, Workbench(calibration=text))
    assert divergence(llama, result.checkpoint, text) < 0.5 * divergence(llama, before, text)
    assert unaccounted(before, result.checkpoint, result.skipped) == []
    changed = {name for name in before.weights if name not in result.skipped}
    assert changed == {name for name, role in before.roles.items() if role in ("linear", "other")}
    for name, weight in before.weights.items():
        made = result.checkpoint.weights[name]
        assert isinstance(made, Dense)
        assert (made.shape, made.dtype) == (weight.shape, weight.dtype), name


def test_a_change_that_cannot_be_merged_is_refused(rounded, text):
    with pytest.raises(InputError, match=r"all linear layers are quantized; let this pass come before"):
        Recover(rank=4).run(rounded, Workbench(calibration=text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_the_matrix_that_is_kept(dtype):
    values = normal(8, 64).to(dtype)
    adapter = Adapter(Dense((8, 64), dtype, lambda: values), 2)
    assert torch.equal(adapter.matrix(), values.float()), "it begins elsewhere"
    with torch.no_grad():
        adapter.up += normal(8, 2, seed=1)
        adapter.factors += 0.1 * normal(8, 1, seed=2)
    merged = adapter.weight()
    assert merged.dtype == dtype
    assert torch.equal(adapter.matrix(), merged.float32())
    expected = adapter.factors * (values.float() + adapter.up @ adapter.down)
    # Half a step: a bfloat16 has 8 significant bits; float32 and its sums some 22 at least.
    share = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    assert torch.all((merged.float32() - expected).abs() <= share * expected.abs() + 1e-6)
    weights = normal(8, 64, seed=3)
    (adapter.matrix() * weights).sum().backward()
    with torch.no_grad():
        exact = values.float() + adapter.up @ adapter.down
        assert torch.allclose(adapter.factors.grad, (weights * exact).sum(1, keepdim=True), atol=1e-5)
        scaled = adapter.factors * weights
        assert torch.allclose(adapter.up.grad, scaled @ adapter.down.t(), atol=1e-5)
        assert torch.allclose(adapter.down.grad, adapter.up.t() @ scaled, atol=1e-5)


def test_an_encoder_learns_the_direction_of_its_embedding(tmp_path, text):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.BertConfig(vocab_size=128, initializer_range=0.2, **sizes)
    source = saved(transformers.BertModel(config), tmp_path)
    rounded = GroupQuantize(embedding_bits=4).run(source).checkpoint
    made = Recover(**SHORT).run(rounded, Workbench(calibration=text)).checkpoint
    assert 1 - cosine(source, made, text) < 0.6 * (1 - cosine(source, rounded, text))


def cosine(one: Checkpoint, other: Checkpoint, text: Calibration) -> float:
    ids = torch.tensor(text.held_out)
    with torch.no_grad():
        made = [build_reference(c)(ids, torch.ones_like(ids)) for c in (one, other)]
    return float(torch.cosine_similarity(*made).mean())


def test_a_finished_export_is_not_learned_again(rounded, text, tmp_path, monkeypatch):
    first = Recover(steps=3).run(rounded, Workbench(Finished(tmp_path), text)).checkpoint
    monkeypatch.setattr(recover.Recover, "_learn", lambda *args: pytest.fail("learned again"))
    again = Recover(steps=3).run(rounded, Workbench(Finished(tmp_path), text)).checkpoint
    for name, weight in first.weights.items():
        assert torch.equal(weight.float32(), again.weights[name].float32()), name


def test_a_smaller_vocabulary_learns_of_its_own_tokens(llama):
    tokens = (3, 5, 7, 100)
    files = {"tokenizer.json": b"{}"}
    trimmed = replace(llama, vocabulary=Vocabulary(tokens, files))
    ids = torch.tensor([[0, 3, 2, 1]])
    with torch.no_grad():
        expected = build_reference(llama)(input_ids=torch.tensor([[3, 100, 7, 5]])).logits[..., list(tokens)]
    assert torch.equal(Teacher(llama, trimmed)(ids), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"rate": -1.0},
        {"rate": 0.0, "code_rate": 0.0},
        {"rank": -1},
        {"rank": 4, "rank_rate": 0.0},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(InputError, match=r"^recover: "):
        Recover(**options)
