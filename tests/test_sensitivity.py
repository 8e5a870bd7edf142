"""What it costs to quantize one matrix: measured on a model that is run from the middle, and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from slm_export.budget import sensitivity
from slm_export.budget.choices import FLOAT16, INT8, Choice, options_for
from slm_export.budget.sensitivity import Reading, Text, measure, quantized_as
from slm_export.bundles.finished import CACHE_VARIABLE
from slm_export.compression.calibration import Calibration
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.source.load import load_checkpoint

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "LlamaForCausalLM": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "Gemma2ForCausalLM": {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4},
    "GPT2LMHeadModel": {"vocab_size": 99, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "BertModel": SMALL,
    "BertForSequenceClassification": {**SMALL, "num_labels": 3},
    "AlbertModel": {**SMALL, "embedding_size": 32, "num_hidden_groups": 2, "num_hidden_layers": 4},
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
    return Calibration(tuple(tuple(row[: 24 - 5 * at]) for at, row in enumerate(ids)), "a test")


def said(source, windows):
    """Return what a model says of every window, none of them padded: rows of log probabilities or of embeddings."""
    model = build_reference(source)
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            if source.task == "text-generation":
                yield model(input_ids=ids).logits[0].log_softmax(-1)
            else:
                made = model(ids, torch.ones_like(ids))
                yield made if source.task == "sentence-embedding" else made.log_softmax(-1)


def directly(source, changed, windows) -> float:
    """Return the distance of two models as one would write it down."""
    each = []
    for p, q in zip(said(source, windows), said(changed, windows), strict=True):
        if source.task == "sentence-embedding":
            each.append(1 - torch.nn.functional.cosine_similarity(p, q, dim=-1))
        else:
            each.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(each).mean().item()


@pytest.mark.parametrize("name", MODELS)
def test_a_run_from_the_middle_costs_what_whole_models_do(name, tmp_path):
    source = saved(tmp_path / "model", name)
    calibration = text()
    costs = measure(source, "a", calibration, lambda *_: None)
    assert costs.keys() == options_for(source).keys()
    # Of every block one matrix; the first and the last are embedding and head, where there is one.
    names = list(costs)
    for matrix in {names[0], *names[2::5], names[-1]}:
        values = quantized_as(source.weights[matrix], INT8)
        changed = replace(source.weights[matrix], dtype=torch.float32, load=lambda values=values: values)
        expected = directly(source, source.with_weights({matrix: changed}), calibration.windows)
        assert costs[matrix][INT8] == pytest.approx(expected, rel=2e-2, abs=1e-6), matrix
        assert costs[matrix][FLOAT16] == 0


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    first = measure(source, "a", text(), lambda *_: None)
    [record] = (tmp_path / "cache" / "sensitivity").iterdir()
    lines = record.read_text().splitlines()
    record.write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])  # killed while it wrote
    made = []
    cost = Reading.cost
    monkeypatch.setattr(
        Reading, "cost", lambda self, name, values: made.append(name) or cost(self, name, values)
    )
    assert measure(source, "a", text(), lambda *_: None) == first
    assert len(made) == len(lines) - 9


def test_other_text_and_another_model_are_measured_anew(tmp_path):
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    measure(source, "a", text(), lambda *_: None)
    measure(source, "b", text(), lambda *_: None)
    measure(source, "a", text(2), lambda *_: None)
    assert len(list((tmp_path / "cache" / "sensitivity").iterdir())) == 3


def test_costs_add_up(tmp_path):
    """Each is of second order in an error that knows nothing of the others."""
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    costs = measure(source, "a", text(), lambda *_: None)
    predicted = sum(of[INT8] for of in costs.values())
    reading = Reading(source, Text.of(source, text().learning))
    whole = reading.cost_of({name: quantized_as(source.weights[name], INT8) for name in costs})
    assert whole == pytest.approx(predicted, rel=0.3)


def test_a_large_vocabulary_is_measured_on_fewer_tokens(tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "LlamaForCausalLM")
    monkeypatch.setattr(sensitivity, "_LOGITS_BYTES", 4 * 99 * 30)
    made = Text.of(source, text().windows)
    assert int(made.mask.sum()) <= 30


def test_tables_of_an_allocation_make_that_allocation(tmp_path):
    from slm_export.budget.choices import tables_of

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
