"""Rotary embeddings as rows of a table.

Angles are position by frequency: in float16 they are wrong by whole turns from some thousand positions on. The
table holds cosines and sines that transformers' own module computes in float32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slm_export.exporters.coreml_dialect import table_rows
from slm_export.graph.rope import FixedRope, LongRope


def with_tables(model: nn.Module, context: int) -> None:
    """Exchange every rotary embedding of ``model`` for tables of ``context`` positions."""
    for path, child in list(model.named_modules()):
        if isinstance(child, LongRope):
            table: nn.Module = _Choice(child, context)
        elif isinstance(child, FixedRope) or hasattr(child, "rope_type"):
            table = _Table(child, context)
        else:
            continue
        model.set_submodule(path, table)
    tables = [child for child in model.modules() if isinstance(child, _Table)]
    if not tables:
        return
    # One run tells what each is asked for: some serve several kinds of layers.
    with torch.no_grad():
        model(
            input_ids=torch.zeros(1, 2, dtype=torch.int64),
            position_ids=torch.arange(2).unsqueeze(0),
            use_cache=False,
        )
    for table in tables:
        del table.original


class _Table(nn.Module):
    """In place of a module (x, positions (1, tokens), kind of layer) -> cosines, sines (1, tokens, width)."""

    original: nn.Module

    def __init__(self, original: nn.Module, context: int) -> None:
        super().__init__()
        self.original = original
        self._context = context
        self._names: dict[Any, tuple[str, ...]] = {}

    def forward(self, x: Tensor, position_ids: Tensor, *kind: Any, **kinds: Any) -> tuple[Tensor, ...]:
        key = (kind, tuple(kinds.items()))
        if key not in self._names:
            self._record(key, x, kind, kinds)
        rows = [table_rows(self.get_buffer(name), position_ids) for name in self._names[key]]
        return tuple(rows)

    def _record(self, key: Any, x: Tensor, kind: Any, kinds: Any) -> None:
        every = torch.arange(self._context).unsqueeze(0)
        made = self.original(x.float(), every, *kind, **kinds)
        names = tuple(f"{part}_{len(self._names)}" for part in ("cos", "sin"))
        for name, table in zip(names, made, strict=True):
            self.register_buffer(name, table[0].contiguous())
        self._names[key] = names


class _Choice(nn.Module):
    """Tables for both factors of LongRoPE, and which of them a call asks for."""

    def __init__(self, original: LongRope, context: int) -> None:
        super().__init__()
        self.short, self.long = (_Table(rope, context) for rope in (original.short_rope, original.long_rope))
        self._is_long = original.is_long

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        is_long = self._is_long(position_ids)
        pairs = zip(self.long(x, position_ids), self.short(x, position_ids), strict=True)
        return tuple(torch.where(is_long, long, short) for long, short in pairs)
