"""A model folder becomes a checkpoint, or is refused with what is wrong and where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import normal
from safetensors.torch import load_file, save_file
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.source.architecture import read_architecture
from slm_export.source.load import check_values, load_checkpoint

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"

Tensors = dict[str, Tensor]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    # Copied: what is read is mapped from the very file that is written.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def problem(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder)
    return str(caught.value)


def values(checkpoint: Checkpoint) -> None:
    check_values(checkpoint, lambda count, name: None)


# --- what is read ------------------------------------------------------------------------------------


def test_every_weight_has_its_role(model):
    loaded = load_checkpoint(model)
    roles = {name.removeprefix("model.layers.0."): role for name, role in loaded.roles.items()}
    assert roles == {
        "model.embed_tokens.weight": "embedding",
        **{f"self_attn.{part}_proj.weight": "linear" for part in "qkvo"},
        **{f"mlp.{part}_proj.weight": "linear" for part in ("gate", "up", "down")},
        "input_layernorm.weight": "other",
        "post_attention_layernorm.weight": "other",
        "model.norm.weight": "other",
    }
    assert list(loaded.roles) == list(loaded.weights)
    assert loaded.tied == {HEAD: EMBEDDING}
    assert (loaded.name, loaded.architecture, loaded.task) == ("model", "LlamaForCausalLM", "text-generation")


def test_an_untied_head_and_tables_have_roles_of_their_own(model, minilm):
    change_config(model, tie_word_embeddings=False)
    change_weights(model, lambda tensors: tensors.update({HEAD: normal(4096, 64)}))
    loaded = load_checkpoint(model)
    assert (loaded.roles[HEAD], dict(loaded.tied)) == ("head", {})
    encoder = load_checkpoint(minilm)
    assert encoder.task == "sentence-embedding"
    assert encoder.roles["embeddings.word_embeddings.weight"] == "embedding"
    assert encoder.roles["embeddings.position_embeddings.weight"] == "table"
    assert encoder.roles["encoder.layer.0.output.dense.weight"] == "linear"


def test_a_tied_pair_may_be_stored_under_either_name_or_both(model):
    expected = load_checkpoint(model).weights[EMBEDDING].load().clone()
    for change in (
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
        lambda tensors: tensors.pop(EMBEDDING),
    ):
        change_weights(model, change)
        loaded = load_checkpoint(model)
        assert HEAD not in loaded.weights
        assert dict(loaded.unused) == {}
        assert torch.equal(loaded.weights[EMBEDDING].load(), expected)


def test_a_head_that_only_the_config_ties_is_not_lost_silently(model):
    change_weights(model, lambda tensors: tensors.update({HEAD: normal(4096, 64)}))
    assert problem(model) == (
        f"{model}: config.json ties {HEAD} to {EMBEDDING}, but the files hold two different matrices; "
        'the model was trained untied: set "tie_word_embeddings": false in config.json'
    )


def test_what_has_no_place_is_named_and_left(model):
    change_weights(model, lambda tensors: tensors.update(rotary=normal(3), ids=torch.arange(4)))
    loaded = load_checkpoint(model)
    assert loaded.unused == {
        "rotary": "LlamaForCausalLM has no such parameter",
        "ids": "I64 values, not floats",
    }


def test_old_names_of_norms_are_understood(minilm, tmp_path):
    folder = Path(shutil.copytree(minilm, tmp_path / "old"))

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            if ".LayerNorm." in name:
                old = name.replace(".weight", ".gamma").replace(".bias", ".beta")
                tensors[old] = tensors.pop(name)

    change_weights(folder, rename)
    old, new = load_checkpoint(folder), load_checkpoint(minilm)
    assert list(old.weights) == list(new.weights)
    name = "encoder.layer.3.output.LayerNorm.bias"
    assert torch.equal(old.weights[name].load(), new.weights[name].load())


def test_matrices_that_the_module_holds_transposed_are_turned(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    source = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4, n_positions=16))
    source.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert name in loaded.transposed
    assert loaded.roles[name] == "linear"
    assert loaded.weights[name].shape == (256, 64)
    assert torch.equal(loaded.weights[name].load(), source.get_parameter(name).t())
    assert EMBEDDING not in loaded.transposed


def test_matrices_stay_on_the_meta_device_and_computed_buffers_are_real(model):
    module = read_architecture(model).empty_module()
    assert all(parameter.is_meta for parameter in module.parameters() if parameter.dim() == 2)
    assert not any(buffer.is_meta for buffer in module.buffers())


# --- what is refused ---------------------------------------------------------------------------------


def test_a_weight_that_is_missing(model):
    change_weights(model, lambda tensors: (tensors.pop(QUERY), tensors.pop(NORM)))
    assert problem(model).startswith(
        f"{model}: 2 weights of LlamaForCausalLM are not in the files, {QUERY} first; "
    )


def test_a_shape_that_contradicts_the_config(model):
    change_config(model, intermediate_size=256)
    assert problem(model).startswith(
        f"{model}: model.layers.0.mlp.down_proj.weight has shape (64, 128), but config.json makes it (64, 256); "
    )


@pytest.mark.parametrize(
    ("value", "bad"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")]
)
def test_a_value_that_is_no_number(model, value, bad):
    values(load_checkpoint(model))
    change_weights(model, lambda tensors: tensors[QUERY].__setitem__((3, 5), value))
    with pytest.raises(InputError, match=f"weight {QUERY} holds {bad}; the model is damaged"):
        values(load_checkpoint(model))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "lama"}, "unknown model type 'lama'; did you mean 'llama'?"),
        ({"model_type": None}, "no model_type; a Hugging Face config.json names one"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}},
            "model type 'mine' needs Python code that",
        ),
        (
            {"architectures": ["LlamaForCausalML"]},
            "unknown architecture 'LlamaForCausalML'; did you mean 'Llama",
        ),
        (
            {"architectures": ["Mine"], "auto_map": {"AutoModel": "m.M"}},
            "architecture Mine needs Python code",
        ),
        ({"architectures": None}, "'architectures' is missing; name the model's class"),
        (
            {"architectures": ["BertForNextSentencePrediction"]},
            "BertForNextSentencePrediction is not a kind of",
        ),
        ({"architectures": ["AutoModel"]}, "unknown architecture 'AutoModel'"),
        ({"hidden_size": "wide"}, "transformers rejects it: "),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_act": "silly"}, "LlamaForCausalLM cannot be built from it: "),
    ],
)
def test_a_config_that_cannot_be_used(model, changes, expected):
    change_config(model, **changes)
    assert problem(model).startswith(f"{model / 'config.json'}: {expected}")
    assert "\n" not in problem(model)


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "not readable as JSON"), ("[]", "expected a JSON object, found list")]
)
def test_a_config_that_is_none(model, text, expected):
    (model / "config.json").write_text(text)
    assert problem(model).startswith(f"{model / 'config.json'}: {expected}")
    (model / "config.json").unlink()
    assert problem(model) == f"{model}: no config.json; give a Hugging Face model folder"


def test_code_in_the_folder_is_never_executed(model):
    trap = f"open({str(model / 'sprung')!r}, 'w')\n"
    for name in ("configuration_llama.py", "modeling_llama.py"):
        (model / name).write_text(trap)
    where = {"AutoConfig": "configuration_llama.C", "AutoModelForCausalLM": "modeling_llama.M"}
    change_config(model, auto_map=where)
    # transformers has this architecture itself: its own class is used, and the folder's code is not.
    assert load_checkpoint(model).architecture == "LlamaForCausalLM"
    change_config(model, model_type="mine")
    problem(model)
    assert not (model / "sprung").exists()
