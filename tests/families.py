"""Tiny models of every family, each with what is peculiar to it switched on. Random weights, large enough to matter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.runtime import ExportOptions

VOCABULARY = 512
STOP = 2
POSITIONS = 128
WINDOW = 16
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS}
_DISTIL = {
    "vocab_size": VOCABULARY,
    "dim": 64,
    "hidden_dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
_MOBILE = {
    **_ENCODER,
    "embedding_size": 32,
    "intermediate_size": 64,
    "intra_bottleneck_size": 32,
}
_FLAUBERT = {
    "vocab_size": VOCABULARY,
    "emb_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.3 * i for i in range(6)],
    "original_max_position_embeddings": 64,
}
_GEMMA = {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}

UNQUANTIZED = 1e-3
"""Share of the range of the scores that an unquantized artifact may differ by."""
ROUNDING = 0.03
"""Share of the range that int8 activations may differ by where two roundings fall on either side of an edge."""

WHOLE = GroupQuantize(bits=32, embedding_bits=32)
INT8 = GroupQuantize(bits=8, embedding_bits=8)

QUICK = (
    "llama-3.2",
    "gemma-2",
    "phi-4-mini",
    "gpt-2",
    "smollm-3",
    "bert, masks",
    "distilbert, answers",
)
"""Families that every run of the tests takes; the others are marked slow."""


def chosen(names: Iterable[str], quick: Collection[str] = QUICK) -> list[Any]:
    """Return the names as parameters of a test."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


Family = tuple[str, str, Mapping[str, Any]]
"""Class, configuration class, and what the configuration says."""

DECODERS: Mapping[str, Family] = {
    "llama-3.2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": WINDOW}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 32}),
    "gemma-2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **_DECODER,
            **_GEMMA,
            # One layer of each kind: layers that alternate are lowered one by one, which is slow.
            "num_hidden_layers": 2,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma-3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_DECODER, **_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi-2": (
        "PhiForCausalLM",
        "PhiConfig",
        {**_DECODER, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    ),
    "phi-3": ("Phi3ForCausalLM", "Phi3Config", {**_DECODER, "sliding_window": None}),
    "phi-4-mini": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            **_DECODER,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_parameters": _LONG_ROPE,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen-2.5": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen-3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 32}),
    "smollm-3": ("SmolLM3ForCausalLM", "SmolLM3Config", {**_DECODER, "no_rope_layers": [1, 0, 1]}),
    # Not a family of ours: known to transformers, attempted through the same path.
    "olmo-2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
}

ENCODERS: Mapping[str, Family] = {
    "bert": ("BertModel", "BertConfig", _ENCODER),
    "bert, classes": ("BertForSequenceClassification", "BertConfig", {**_ENCODER, "num_labels": 3}),
    "bert, tokens": ("BertForTokenClassification", "BertConfig", {**_ENCODER, "num_labels": 3}),
    "bert, masks": ("BertForMaskedLM", "BertConfig", _ENCODER),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTIL),
    "distilbert, answers": ("DistilBertForQuestionAnswering", "DistilBertConfig", _DISTIL),
    "albert": ("AlbertModel", "AlbertConfig", {**_ENCODER, "embedding_size": 32}),
    "mobilebert": ("MobileBertModel", "MobileBertConfig", _MOBILE),
    "flaubert": ("FlaubertModel", "FlaubertConfig", _FLAUBERT),
    "roberta, classes": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_ENCODER, "pad_token_id": 1, "max_position_embeddings": 66},
    ),
}


def save(family: Family, folder: Path) -> None:
    """Write a model of the family to ``folder``."""
    import transformers

    name, config, options = family
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial weights are so small that every logit is nearly 0 and any mistake drowns.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)


def eager(family: Family, folder: Path) -> Callable[..., Any]:
    """Return the oracle: transformers' own model of ``folder``, eager attention, float32."""
    import transformers

    cls = getattr(transformers, family[0])
    model: Callable[..., Any] = cls.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    return model


def exported(checkpoint: Checkpoint, path: Path) -> Any:
    """Write a program and return a session of it."""
    exporter = ExecuTorchExporter()
    exporter.ready()
    exporter.check(checkpoint)
    exporter.write(checkpoint, ExportOptions(context=64, stop_ids=(STOP,), bos_id=1), path)
    return exporter.open(path, checkpoint.task)


def apart(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the range of what is expected."""
    return float((got - expected).abs().max() / (expected.max() - expected.min()))


def ids_of(count: int) -> Tensor:
    """Return random token ids, int64 (1, count)."""
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(5))


def save_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE of exactly `VOCABULARY` tokens, all ASCII: whatever a model writes is text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="ascii")], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
