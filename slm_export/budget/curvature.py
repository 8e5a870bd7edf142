"""How strongly a model's output follows from each value of each matrix: squared slopes, of one run backwards.

What a model says moves, for a small change d of its values, by half of d^T F d, where F is the Fisher information: the
mean product of slopes of log p(y) for y as likely as the model itself says. Of F the diagonal is taken: errors of
rounding know nothing of each other (LeCun et al., "Optimal Brain Damage", 1990; Kim et al., "SqueezeLLM", 2023).
It takes one run forwards and one back for all matrices together. Embeddings have the slopes of a random direction in
its place: 1 - cosine is half the squared distance of what has length 1, and the mean over directions gives that.

Every matrix is met once for each of its uses in the model, with what went in and the slopes of what came out. Blocks
are run again on the way back, so that what they compute inside stands in memory for one of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as again_on_the_way_back

from slm_export.checkpoint import Checkpoint
from slm_export.compression.blocks import CannotWalk, find_blocks
from slm_export.graph.dialect import ReferenceDialect
from slm_export.graph.model import build_reference
from slm_export.source.tasks import EMBEDDING, GENERATION
from slm_export.weights import Weight, float_blocks

_VALUES = 1 << 22  # of a matrix that stand in memory as float32 at a time
_SEED = 7

Hear = Callable[[str, Tensor, Tensor], None]
"""Is told the name of a matrix, what went in, and the slopes of what came out, float32 (windows, n, out): of a linear
layer float32 (windows, n, in), of a table ids int64 (windows, n)."""


def slopes(source: Checkpoint, ids: Tensor, mask: Tensor, hear: Hear) -> int:
    """Let the model read windows, int64 (windows, n), and tell every matrix's slopes; return how many outputs it has.

    The slopes are those of a sum over all outputs (tokens of a decoder, texts otherwise), to be squared and divided by
    their number.
    """
    names = {id(weight): name for name, weight in source.weights.items()}
    model = build_reference(source, dialect=_Listening(names, hear))
    try:
        blocks: list[nn.Module] = list(find_blocks(model)[1])
    except CannotWalk:
        blocks = []
    for block in blocks:
        block.forward = partial(
            again_on_the_way_back, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    with torch.enable_grad():
        decodes = source.task == GENERATION
        said = model(input_ids=ids, use_cache=False).logits if decodes else model(ids, mask)
        total, count = _drawn(source.task, said.float(), mask)
        total.backward()  # type: ignore[no-untyped-call]
    return count


def _drawn(task: str, said: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """Return a sum whose squared slopes are the Fisher information in the mean, and over how many outputs it is."""
    generator = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(0, 2, said.shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1)
    if task == EMBEDDING:
        return (nn.functional.normalize(said, dim=-1) * signs).sum(), len(said)
    said = said.log_softmax(-1)
    # The mean over signs of the squared slope is the sum over y of p(y) times that of log p(y): no y need be drawn.
    of_each = (said * signs.mul_((said.detach() / 2).exp())).sum(-1)
    if of_each.shape == mask.shape:
        return (of_each * mask).sum(), int(mask.sum())
    return of_each.sum(), of_each.numel()


class _Listening(ReferenceDialect):
    """The reference, whose matrices tell what passes through them on the way back."""

    def __init__(self, names: dict[int, str], hear: Hear) -> None:
        super().__init__()
        self._names, self._hear = names, hear

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return the layer."""
        return _Heard(super().linear(weight, bias), weight, partial(self._hear, self._names[id(weight)]))

    def embedding(self, weight: Weight) -> nn.Module:
        """Return the look-up; gradients begin here."""
        return _Heard(super().embedding(weight), weight, partial(self._hear, self._names[id(weight)]))


class _Heard(nn.Module):
    def __init__(self, part: nn.Module, weight: Weight, hear: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.part, self.source, self.hear = part, weight, hear
        self.out_features, self.in_features = weight.shape[:2]
        self.start = torch.zeros((), requires_grad=True)

    def forward(self, given: Tensor) -> Tensor:
        return _Hearing.apply(given, self.start, self)  # type: ignore[no-untyped-call, no-any-return]


class _Hearing(torch.autograd.Function):
    """A part whose matrix is read again on the way back; it is no parameter, and none of it is kept."""

    @staticmethod
    def forward(context: Any, given: Tensor, start: Tensor, heard: _Heard) -> Tensor:
        context.heard = heard
        context.save_for_backward(given)
        made: Tensor = heard.part(given)
        return made

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> tuple[Tensor | None, None, None]:
        (given,), heard, [slope] = context.saved_tensors, context.heard, slopes
        heard.hear(given, slope)
        if not given.is_floating_point():
            return None, None, None
        back, row = torch.zeros_like(given), 0
        for rows in float_blocks(heard.source, _VALUES):
            back += slope[..., row : row + len(rows)] @ rows
            row += len(rows)
        return back, None, None
