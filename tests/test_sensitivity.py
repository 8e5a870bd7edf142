"""What it costs to quantize one matrix: told by the slopes of one run, held against models that are quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from slm_export.budget import sensitivity
from slm_export.budget.choices import FLOAT16, INT8, Choice, options_for, tables_of
from slm_export.budget.curvature import _drawn
from slm_export.budget.sensitivity import Text, measure
from slm_export.bundles.finished import CACHE_VARIABLE
from slm_export.compression.calibration import Calibration
from slm_export.compression.distance import Distance
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.source.load import load_checkpoint

FOUR = Choice(4, 32)
SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "LlamaForCausalLM": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "Gemma2ForCausalLM": {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4},
    "GPT2LMHeadModel": {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "BertModel": SMALL,
    "BertForSequenceClassification": {**SMALL, "num_labels": 3},
    "AlbertModel": {**SMALL, "embedding_size": 32, "num_hidden_groups": 1, "num_hidden_layers": 3},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def saved(folder: Path, name: str):
    cls = getattr(transformers, name)
    torch.manual_seed(1)
    model = cls(cls.config_class(**MODELS[name]))
    for (
        parameter
    ) in model.parameters():  # what a fresh model says is nearly nothing; quantizing it changes nothing
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    return load_checkpoint(folder)


def text(windows: int = 3) -> Calibration:
    ids = torch.randint(1, 99, (windows, 24), generator=torch.Generator().manual_seed(2)).tolist()
    return Calibration(tuple(tuple(row[: 24 - 5 * (at % 3)]) for at, row in enumerate(ids)), "a test")


def distance(source, allocation, windows) -> float:
    """Return how far a model is from its source once some of its matrices are stored otherwise."""
    kept = dict.fromkeys(options_for(source), 32)
    tables = tables_of(allocation)
    step = GroupQuantize(**{**tables, "bits_by_tensor": {**kept, **tables["bits_by_tensor"]}})
    return Distance(source, windows, 10_000).to(step.run(source).checkpoint)


@pytest.mark.parametrize("task", ["text-generation", "sentence-embedding", "sequence-classification"])
def test_the_mean_product_of_slopes_is_the_fisher_information(task):
    """Of logits diag(p) - p p^T, of an embedding e (1 - e e^T / |e|^2) / |e|^2; a mean of n errs by 5 deviations."""
    row, n = torch.tensor([2.0, 0.5, -1.0, 0.0]), 20_000
    said = (row.repeat(1, n, 1) if task == "text-generation" else row.repeat(n, 1)).requires_grad_()
    total, outputs = _drawn(task, said, torch.ones(1, n, dtype=torch.int64))
    total.backward()
    assert outputs == n
    slopes = said.grad.view(n, 4)
    p, unit = row.softmax(-1), row / row.norm()
    if task == "sentence-embedding":
        expected = (torch.eye(4) - torch.outer(unit, unit)) / row.norm() ** 2
    else:
        expected = p.diag() - torch.outer(p, p)
    products = slopes[:, :, None] * slopes[:, None, :]
    error = (products.mean(0) - expected).abs()
    assert (error <= 5 * products.std(0) / n**0.5 + 1e-6).all()


@pytest.mark.parametrize("name", MODELS)
def test_what_slopes_tell_is_what_quantizing_does(name, tmp_path):
    """Of all matrices, and of a third of them, give or take what random signs tell by chance."""
    source = saved(tmp_path / "model", name)
    calibration = text(16 if source.task == "text-generation" else 48)
    costs = measure(source, "a", calibration, lambda *_: None)
    assert costs.keys() == options_for(source).keys()
    assert {of[FLOAT16] for of in costs.values()} == {0.0}
    # Few scores of few texts say less: errors of the last matrix are the same for all of them.
    near = {"text-generation": 0.3, "sentence-embedding": 0.3}.get(source.task, 0.9)
    for names in (list(costs), list(costs)[::3]):
        allocation = {name: FOUR if FOUR in costs[name] else INT8 for name in names}
        predicted = sum(costs[name][choice] for name, choice in allocation.items())
        assert predicted == pytest.approx(distance(source, allocation, calibration.learning), rel=near)


def test_fewer_bits_and_larger_groups_cost_more(tmp_path):
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    for name, of in measure(source, "a", text(), lambda *_: None).items():
        ordered = sorted(of.items(), key=lambda item: (-item[0].bits, item[0].group))
        assert [cost for _, cost in ordered] == sorted(cost for _, cost in ordered), name


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    first = measure(source, "a", text(), lambda *_: None)
    [record] = (tmp_path / "cache" / "sensitivity").iterdir()
    runs = []
    slopes = sensitivity.slopes
    monkeypatch.setattr(sensitivity, "slopes", lambda *given: runs.append(1) or slopes(*given))
    assert measure(source, "a", text(), lambda *_: None) == first
    assert not runs
    record.write_text("\n".join(record.read_text().splitlines()[:-2]))  # torn
    assert measure(source, "a", text(), lambda *_: None) == first
    assert len(runs) == 1
    for identity, other in (("b", text()), ("a", text(2))):
        measure(source, identity, other, lambda *_: None)
    assert len(runs) == 3


def test_a_large_vocabulary_is_measured_on_fewer_tokens(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    monkeypatch.setattr(sensitivity, "_LOGITS_BYTES", 4 * 99 * 30)
    made = Text.of(source, text().windows)
    assert int(made.mask.sum()) <= 30


def test_tables_of_an_allocation_make_that_allocation(tmp_path):
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    allocation = {
        name: choices[at % len(choices)] for at, (name, choices) in enumerate(options_for(source).items())
    }
    made = GroupQuantize(**tables_of(allocation)).run(source).checkpoint
    for name, choice in allocation.items():
        weight = made.weights[name]
        found = (
            Choice(16)
            if not hasattr(weight, "bits")
            else Choice(weight.bits, weight.group if weight.bits == 4 else 0)
        )
        assert found == choice, name
    assert json.dumps(tables_of(allocation))
