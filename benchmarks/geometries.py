"""Model folders in the geometry of well-known models, with random weights: what conversion costs depends on shapes.

The tokenizer is the example model's; it is smaller than these vocabularies, which an export allows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "pycode-5m"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_SHARD = 2_000_000_000  # bytes

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

GEOMETRIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "LlamaForCausalLM",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-360m": (
        "LlamaForCausalLM",
        {
            "vocab_size": 49152,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "LlamaForCausalLM",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-3b": (
        "LlamaForCausalLM",
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "phi-4-mini": (
        "Phi3ForCausalLM",
        {
            "vocab_size": 200064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + i for i in range(48)],
            },
            "pad_token_id": 2,
            "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": (
        "MistralForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
}
"""Name -> transformers class and configuration, as the published config.json files say (SmolLM2, Llama 3.2,
Phi-4-mini and Mistral 7B v0.1; the factors of Phi-4-mini's LongRoPE are made up)."""


def make(geometry: str, folder: Path) -> Path:
    """Return a folder with this geometry, bfloat16 and random; made if it is not there."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    module = _empty(geometry, folder)
    for name in _TOKENIZER:
        shutil.copy(EXAMPLE / name, folder / name)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        shard[name] = _random(parameter)
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD:
            _save(shard, folder, index)
    _save(shard, folder, index)
    document = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(document)
    return folder


def _empty(geometry: str, folder: Path) -> Any:
    import transformers

    name, options = GEOMETRIES[geometry]
    cls: Any = getattr(transformers, name)
    config = cls.config_class(bos_token_id=0, eos_token_id=1, **options)
    config.architectures = [name]
    config.save_pretrained(folder)
    with torch.device("meta"):
        return cls(config)


def _random(parameter: Tensor) -> Tensor:
    if parameter.dim() < 2:
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    return torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02


def _save(shard: dict[str, Tensor], folder: Path, index: dict[str, str]) -> None:
    if shard:
        file = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, folder / file)
        index.update(dict.fromkeys(shard, file))
        shard.clear()
