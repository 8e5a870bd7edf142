"""The oracle against transformers itself, for families that differ in every way that matters here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.source.load import load_checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}

DECODERS = {
    "LlamaForCausalLM": {**GROUPED, "tie_word_embeddings": True},
    "MistralForCausalLM": {**GROUPED, "tie_word_embeddings": False},
    "Qwen2ForCausalLM": {**GROUPED, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 32, "tie_word_embeddings": False},
    "Phi3ForCausalLM": GROUPED,
    "GPT2LMHeadModel": {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoXForCausalLM": SMALL,
    "GemmaForCausalLM": {**GROUPED, "head_dim": 16},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 0.1},
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2},
}
CLASSIFIERS = {
    "BertForSequenceClassification": {**SMALL, "num_labels": 3},
    "RobertaForSequenceClassification": {**SMALL, "num_labels": 3, "pad_token_id": 1},
    "DistilBertForSequenceClassification": {
        "vocab_size": 99,
        "dim": 64,
        "hidden_dim": 96,
        "n_layers": 2,
        "n_heads": 4,
        "num_labels": 3,
    },
}
ENCODERS = {
    "BertModel": SMALL,
    "MPNetModel": SMALL,
    "DistilBertModel": {"vocab_size": 99, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
}


def saved(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """Return a model of random weights as transformers has it, and save it."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval()
    for parameter in model.parameters():
        # Biases and norms too: those that start at 0 and 1 would hide a mistake.
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def tokens(count: int = 12, rows: int = 1) -> Tensor:
    return torch.randint(5, 99, (rows, count), generator=torch.Generator().manual_seed(1))


def logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = build_reference(checkpoint)(input_ids=ids, use_cache=False).logits
        return found


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_says_what_transformers_says(tmp_path, name):
    model = saved(tmp_path, name, DECODERS[name])
    loaded = load_checkpoint(tmp_path)
    assert (loaded.architecture, loaded.task, dict(loaded.unused)) == (name, "text-generation", {})
    assert loaded.parameters == sum(parameter.numel() for parameter in model.parameters())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
    assert torch.allclose(logits(loaded, tokens()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_scores_as_transformers_does(tmp_path, name):
    model = saved(tmp_path, name, CLASSIFIERS[name])
    ids, mask = tokens(rows=2), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        found = build_reference(load_checkpoint(tmp_path))(ids, mask)
    assert found.shape == (2, 3)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_embeds_as_transformers_does(tmp_path, name):
    model = saved(tmp_path, name, ENCODERS[name])
    ids, mask = tokens(rows=2), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask).last_hidden_state
        expected = torch.stack([hidden[0].mean(0), hidden[1, :7].mean(0)])
        found = build_reference(load_checkpoint(tmp_path))(ids, mask)
    assert torch.allclose(found, torch.nn.functional.normalize(expected), atol=1e-5)


def test_pycode_says_what_transformers_says(pycode):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pycode, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(3, 4096, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
    found = logits(load_checkpoint(pycode), ids)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def minilm_batch(folder: Path) -> tuple[list[str], Tensor, Tensor]:
    texts = ["A cat sat on the mat.", "Export the model to a phone, then compare it with its source.", "x"]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    return texts, batch["input_ids"], batch["attention_mask"]


def test_minilm_embeds_as_transformers_does(minilm):
    _, ids, mask = minilm_batch(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask).last_hidden_state
        found = build_reference(load_checkpoint(minilm))(ids, mask)
    means = torch.stack([row[: int(kept.sum())].mean(0) for row, kept in zip(hidden, mask, strict=True)])
    assert torch.allclose(found, torch.nn.functional.normalize(means), atol=1e-5)


def test_minilm_embeds_as_sentence_transformers_does(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts, ids, mask = minilm_batch(minilm)
    expected = sentence_transformers.SentenceTransformer(str(minilm), device="cpu").encode(texts)
    with torch.no_grad():
        found = build_reference(load_checkpoint(minilm))(ids, mask)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


FAMILIES = {**DECODERS, **CLASSIFIERS, **ENCODERS}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_longest_input_can_be_read(tmp_path, name):
    saved(tmp_path, name, FAMILIES[name])
    loaded = load_checkpoint(tmp_path)
    # RoBERTa and MPNet count from behind the padding's row: of 64 rows, 62 are of tokens.
    expected = 512 if "Distil" in name else 62 if name.startswith(("Roberta", "MPNet")) else 64
    assert loaded.positions == expected
    ids = tokens(expected)
    with torch.no_grad():
        if name in DECODERS:
            logits(loaded, ids)
        else:
            build_reference(loaded)(ids, torch.ones_like(ids))


# --- the same weights, stored in other ways ----------------------------------------------------------


def restored(source: Path, folder: Path, rename: dict[str, str]) -> Path:
    """Copy a model with the beginnings of its tensors' names exchanged, in two shards with an index."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for old, new in rename.items():
        tensors = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("rename", [{}, {"model.": ""}], ids=["same names", "without the prefix"])
def test_shards_and_names_make_no_difference(tiny_llama, tmp_path, rename):
    other = load_checkpoint(restored(tiny_llama, tmp_path / "other", rename))
    assert torch.equal(logits(other, tokens()), logits(load_checkpoint(tiny_llama), tokens()))


def test_a_prefix_of_a_larger_class_is_taken_off(tmp_path):
    saved(tmp_path / "plain", "BertModel", ENCODERS["BertModel"])
    folder = restored(tmp_path / "plain", tmp_path / "prefixed", {"e": "bert.e", "pooler.": "bert.pooler."})
    ids, mask = tokens(), torch.ones(1, 12, dtype=torch.int64)
    first, second = (build_reference(load_checkpoint(f)) for f in (tmp_path / "plain", folder))
    assert torch.equal(first(ids, mask), second(ids, mask))


# --- what the oracle holds ---------------------------------------------------------------------------


def test_no_matrix_stands_in_memory(pycode):
    reference = build_reference(load_checkpoint(pycode))
    held = [*reference.parameters(), *reference.buffers()]
    assert sum(tensor.numel() for tensor in held) < 0.005 * load_checkpoint(pycode).parameters


def test_a_quantized_checkpoint_runs_with_its_dequantized_weights(tiny_llama):
    before = load_checkpoint(tiny_llama)
    after = GroupQuantize(bits=4, embedding_bits=8).run(before).checkpoint
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.data = after.weights[name].float32()
    with torch.no_grad():
        expected = model(tokens()).logits
    assert torch.allclose(logits(after, tokens()), expected, atol=1e-5)
    assert not torch.allclose(logits(before, tokens()), expected, atol=1e-3)


def test_an_embedding_that_does_more_than_look_up_is_refused(tmp_path):
    saved(tmp_path, "OPTForCausalLM", {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64})
    with pytest.raises(InputError, match="an embedding of class OPTLearnedPositionalEmbedding does more"):
        logits(load_checkpoint(tmp_path), tokens())
