"""Rotary embeddings as one operator, while a model is traced.

transformers rotates queries and keys in a function of each family's module: seven operators each, which are most of
the graph of a layer. Where that function is the usual one, it is exchanged for ``RotaryEmbedding``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

_FUNCTION = "apply_rotary_pos_emb"


@contextmanager
def rotary_operators(model: nn.Module) -> Iterator[None]:
    """Let the layers of ``model`` rotate by the operator, in this block."""
    names = {type(child).__module__ for child in model.modules() if hasattr(child, "layer_idx")}
    with ExitStack() as stack:
        for module in (sys.modules[name] for name in sorted(names)):
            original = getattr(module, _FUNCTION, None)
            if original is not None and _is_usual(original):
                stack.enter_context(mock.patch.object(module, _FUNCTION, _by_operator(original)))
        yield


def _by_operator(original: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or cos.dim() != 3 or not cos.shape[-1] == q.shape[-1] == k.shape[-1]:
            return original(q, k, cos, sin, *args, **kwargs)
        # Both halves are the same frequencies; the operator takes one.
        half = cos.shape[-1] // 2
        angles = (cos[..., :half], sin[..., :half])
        return tuple(_rotated(x, angles) for x in (q, k))

    return rotate


def _rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (1, heads, tokens, width) by angles (1, tokens, width / 2).

    The operator is given its heads side by side, as a product leaves them and attention takes them: then what turns
    them one way and back falls out of the graph (`onnx_fused`).
    """
    _, heads, tokens, width = x.shape
    flat = x.transpose(1, 2).reshape(1, tokens, heads * width)
    made = torch.onnx.ops.symbolic(
        "RotaryEmbedding", (flat, *angles), {"num_heads": heads}, dtype=x.dtype, shape=flat.shape
    )
    return made.reshape(1, tokens, heads, width).transpose(1, 2)


def _is_usual(original: Callable[..., Any]) -> bool:
    """Whether a function turns the first half against the second, as the operator does."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (2, 1))
    cos, sin = (torch.randn(1, 3, 4, generator=generator).repeat(1, 1, 2) for _ in range(2))
    try:
        got = original(q, k, cos, sin)
    except (TypeError, RuntimeError):
        return False
    expected = (x * cos + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin for x in (q, k))
    return all(torch.allclose(one, other, atol=1e-6) for one, other in zip(got, expected, strict=True))
