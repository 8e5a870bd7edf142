"""The example model's weights in other architectures.

Faults are planted in what was really trained: random weights have no preferences that a fault could change. Families
that compute what Llama does, and something beside, take the example's weights as they are; what they add (a window, a
cap, biases, other angles) costs them some of their skill, and none of their certainty.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pycode-5m"
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
    "long_factor": [1.2 + 0.02 * i for i in range(32)],
    "original_max_position_embeddings": 512,
}

Weights = dict[str, Tensor]


def _same(weights: Weights) -> Weights:
    return weights


@dataclass(frozen=True)
class Model:
    """How a folder differs from the example's."""

    model_type: str = "llama"
    architecture: str = "LlamaForCausalLM"
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[Weights], Weights] = _same
    stops: tuple[int, ...] = (1,)


def _layers(weights: Weights) -> range:
    return range(1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name))


def _biases(weights: Weights) -> Weights:
    """Small biases of attention."""
    generator = torch.Generator().manual_seed(0)
    added = {
        name.replace("weight", "bias"): 0.3 * torch.randn(value.shape[0], generator=generator)
        for name, value in weights.items()
        if "self_attn" in name
    }
    return {**weights, **added}


def _head_norms(weights: Weights) -> Weights:
    """Norms of every head's query and key, which keep about the size that there was."""
    added = {}
    for layer in _layers(weights):
        for part in "qk":
            ramp = torch.linspace(0.8, 1.6, 64)
            added[f"model.layers.{layer}.self_attn.{part}_norm.weight"] = ramp
    return {**weights, **added}


def _fused(weights: Weights) -> Weights:
    """Phi-3's names: queries, keys and values in one matrix, gate and up in another."""
    made = {name: value for name, value in weights.items() if "_proj" not in name}
    for layer in _layers(weights):
        stem = f"model.layers.{layer}"
        take = lambda name, stem=stem: weights[f"{stem}.{name}_proj.weight"]  # noqa: E731
        made[f"{stem}.self_attn.qkv_proj.weight"] = torch.cat([take(f"self_attn.{part}") for part in "qkv"])
        made[f"{stem}.mlp.gate_up_proj.weight"] = torch.cat([take("mlp.gate"), take("mlp.up")])
        for name in ("self_attn.o", "mlp.down"):
            made[f"{stem}.{name}_proj.weight"] = take(name)
    return made


def _offset_norms(weights: Weights) -> Weights:
    """Gemma's norms, which add 1 to their weight, and its embedding, which is multiplied by the root of the width."""
    made = {name: value - 1 if "norm" in name else value for name, value in weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    return {**made, "lm_head.weight": embedding.clone(), "model.embed_tokens.weight": embedding / 16}


MODELS: Mapping[str, Model] = {
    "llama": Model(),
    "two stops": Model(stops=(1, 200)),
    "llama, gelu": Model(config={"hidden_act": "gelu_pytorch_tanh"}),
    "llama 3": Model(config={"rope_parameters": SCALING}),
    "mistral": Model("mistral", "MistralForCausalLM", {"sliding_window": 32}),
    "smollm 3": Model("smollm3", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 0, 1, 1, 0]}),
    "llama, biases": Model(config={"attention_bias": True}, weights=_biases),
    "qwen 3": Model("qwen3", "Qwen3ForCausalLM", weights=_head_norms),
    "phi 3": Model(
        "phi3",
        "Phi3ForCausalLM",
        {
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_window": None,
        },
        _fused,
    ),
    "phi 4": Model(
        "phi3",
        "Phi3ForCausalLM",
        {
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 512,
            "sliding_window": None,
        },
        _fused,
    ),
    "gemma": Model(
        "gemma",
        "GemmaForCausalLM",
        {"hidden_act": "silu", "hidden_activation": "silu", "tie_word_embeddings": False},
        _offset_norms,
    ),
}


def save(name: str, folder: Path) -> None:
    """Write one of `MODELS`."""
    model = MODELS[name]
    folder.mkdir(parents=True)
    config = json.loads((EXAMPLE / "config.json").read_text("utf-8"))
    config |= {**model.config, "model_type": model.model_type, "architectures": [model.architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: value.float() for name, value in load_file(EXAMPLE / "model.safetensors").items()}
    made = {name: value.contiguous() for name, value in model.weights(weights).items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    for file in FILES:
        shutil.copy(EXAMPLE / file, folder / file)
    told = json.loads((EXAMPLE / "generation_config.json").read_text("utf-8"))
    (folder / "generation_config.json").write_text(json.dumps({**told, "eos_token_id": list(model.stops)}))
