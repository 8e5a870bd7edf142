"""Rotary embeddings whose frequencies depend on the length, in a form that can be traced.

transformers chooses them in Python at every call and writes them to a buffer of the module. Here the same
choice is part of the graph. The formula itself stays transformers' own (its undecorated ``forward``).
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from slm_export.errors import InputError


def make_traceable(model: nn.Module, context: int) -> None:
    """Exchange the rotary embeddings of ``model`` that change with the length.

    Raises:
        InputError: frequencies that grow without end ("dynamic") and a context beyond the trained length.
    """
    for path, child in list(model.named_modules()):
        kind = getattr(child, "rope_type", None)
        if kind == "longrope":
            model.set_submodule(path, LongRope(child))
        elif isinstance(kind, str) and "dynamic" in kind:
            if context > child.original_max_seq_len:
                raise InputError(
                    f"context {context} is longer than the {child.original_max_seq_len} positions that the model "
                    "was trained on, and its dynamic RoPE scaling beyond them cannot be exported; "
                    "give a smaller --context"
                )
            model.set_submodule(path, FixedRope(child, child.inv_freq))
        elif isinstance(kind, dict) and {"longrope", "dynamic"} & set(kind.values()):
            raise InputError(
                f"RoPE that differs by layer and depends on the length ({kind}) cannot be exported yet"
            )


class FixedRope(nn.Module):
    """Frequencies that stay what they are."""

    def __init__(self, rope: nn.Module, frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", frequencies)
        self._scaling = rope.attention_scaling
        self._formula = inspect.unwrap(type(rope).forward)

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """Return cosines and sines, (1, tokens, width) each."""
        return self._apply_formula(self.inv_freq, x, position_ids)

    def _apply_formula(self, frequencies: Any, x: Tensor, position_ids: Tensor) -> Any:
        owner = SimpleNamespace(inv_freq=frequencies, attention_scaling=self._scaling)
        return self._formula(owner, x, position_ids)


class LongRope(FixedRope):
    """Short factors up to the trained length, long factors beyond it (LongRoPE, Ding et al. 2024)."""

    short: Tensor
    long: Tensor

    def __init__(self, rope: nn.Module) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        super().__init__(rope, rope.inv_freq)  # type: ignore[arg-type]
        config: Any = rope.config
        self.trained = int(config.rope_parameters["original_max_position_embeddings"])
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=self.trained + 1)
        short: Any = rope.original_inv_freq
        self.short_rope, self.long_rope = FixedRope(rope, short), FixedRope(rope, long)
        self.register_buffer("short", short)
        self.register_buffer("long", long)

    def is_long(self, position_ids: Tensor) -> Tensor:
        """Return whether a call goes beyond the trained length, bool ()."""
        return position_ids.max() + 1 > self.trained

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """Return cosines and sines of whichever frequencies the length of the call asks for."""
        frequencies = torch.where(self.is_long(position_ids), self.long, self.short)
        return self._apply_formula(frequencies, x, position_ids)
