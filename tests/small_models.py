"""Small models with random weights that are large enough to matter, and text that uses little of their vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration
from slm_export.graph.model import build_reference
from slm_export.source.load import load_checkpoint

LLAMA: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def saved(model: Any, folder: Path) -> Checkpoint:
    """Save a transformers model, its vectors random too, and open it."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = 0.3 * torch.randn(parameter.shape)
            parameter.data += noise if name.endswith("bias") else noise.abs()
    model.save_pretrained(folder)
    return load_checkpoint(folder)


def llama(folder: Path, **options: Any) -> Checkpoint:
    """Two layers, untied, with grouped queries, unless told otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return saved(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **options})), folder)


def random_text(windows: int = 48, length: int = 24, seed: int = 1) -> Calibration:
    """Windows over 20 tokens, so that some directions of the activations matter more than others."""
    ids = torch.randint(20, (windows, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(tuple(map(tuple, ids.tolist())), "random")


def logits(checkpoint: Checkpoint, text: Calibration) -> torch.Tensor:
    """Return a decoder's logits on the windows that are not calibrated on, (windows, tokens, vocabulary)."""
    with torch.no_grad():
        made: torch.Tensor = build_reference(checkpoint)(input_ids=torch.tensor(text.held_out)).logits
    return made


def divergence(source: Checkpoint, other: Checkpoint, text: Calibration) -> float:
    """Return the mean KL divergence on the windows that are not calibrated on."""
    p, q = (logits(c, text).log_softmax(-1) for c in (source, other))
    return float((p.exp() * (p - q)).sum(-1).mean())
