"""Attention that sees, weighs or reads something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from fault import Fault
from torch import Tensor, nn

from slm_export.graph import model
from slm_export.graph.dialect import AttentionShape, Dialect, Position

KIND = "attention"

Change = Callable[[Any], Any]
"""Of one of `AttentionShape`'s values into another."""
Turn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class _Turned(nn.Module):
    """Attention that is given its inputs in another order."""

    def __init__(self, part: nn.Module, turn: Turn) -> None:
        super().__init__()
        self.part, self.turn = part, turn

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.part(*self.turn(query, key, value))


class _Other:
    """A dialect whose attention differs from what the layers asked for."""

    def __init__(self, dialect: Dialect, turn: Turn | None, changes: Mapping[str, Change]) -> None:
        self._dialect, self._turn, self._changes = dialect, turn, changes

    def cached_attention(self, shape: AttentionShape, position: Position) -> nn.Module:
        # None of a window stays None: only layers that have one can get another.
        changes = {
            name: change(old)
            for name, change in self._changes.items()
            if (old := getattr(shape, name)) is not None
        }
        part = self._dialect.cached_attention(replace(shape, **changes), position)
        return part if self._turn is None else _Turned(part, self._turn)


@contextmanager
def attending(turn: Turn | None = None, **changes: Change) -> Iterator[None]:
    """Let every layer attend in another way."""
    original = model._put_caches

    def put(decoder: Any, dialect: Any) -> None:
        original(decoder, _Other(dialect, turn, changes))

    with patch.object(model, "_put_caches", put):
        yield


def attention(name: str, subject: str = "llama", turn: Turn | None = None, **changes: Change) -> Fault:
    return Fault(name, KIND, subject, writing=lambda: attending(turn, **changes))


def _other_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads take turns at the groups, where neighbours share one."""
    groups = key.shape[1]
    order = [head for group in range(groups) for head in range(group, query.shape[1], groups)]
    return query[:, order], key, value


FAULTS = (
    attention("no scale", scaling=lambda scale: 1.0),
    attention("scaled by the width, not by its root", scaling=lambda scale: scale**2),
    attention("a window one position short", "mistral", window=lambda window: window - 1),
    attention("a window one position long", "mistral", window=lambda window: window + 1),
    attention("a window of half its size", "mistral", window=lambda window: window // 2),
    attention("the window is ignored", "mistral", window=lambda window: None),
    attention("key-value groups exchanged", turn=lambda q, k, v: (q, k.flip(1), v.flip(1))),
    attention("queries take turns at the groups", turn=_other_heads),
    attention("keys and values exchanged", turn=lambda q, k, v: (q, v, k)),
    attention("values of the other group", turn=lambda q, k, v: (q, k, v.flip(1))),
)
