"""What a client does in a round: some steps on its own examples, from the tensors that came to the tensors that go.

Every example counts the same, however long it is: the loss of a step is the mean of its examples' means. That is what
can be clipped by example, and it is the same loss with privacy and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slm_export.errors import InputError
from slm_export.federated.accounting import Ledger
from slm_export.federated.base import Base, put, taken
from slm_export.federated.examples import Examples
from slm_export.federated.settings import Local, Privacy
from slm_export.federated.updates import Tensors
from slm_export.learning.evaluation import batches, documents_of
from slm_export.learning.measures import Interval, mean
from slm_export.learning.trainer import IGNORED, Batch, Example, collate, labels_of
from slm_export.learning.windows import spread
from slm_export.source.tasks import CLASSIFICATION

_MEASURED = 64
"""Examples at most that a client tells its loss of."""


@dataclass(frozen=True)
class Learned:
    """What came of a client's round."""

    tensors: Tensors
    examples: int
    """That the client has."""
    steps: int
    """That were made; fewer than asked for, where the budget was spent."""
    loss_before: float | None = None
    """Mean over at most 64 of the examples, in nats; None with example-level privacy: an exact loss would leak."""
    loss_after: float | None = None
    ledger: Ledger | None = None
    """All that the client has released, with this round; to be kept before the tensors go. None: nothing is counted."""
    exhausted: bool = False
    """Whether the budget ended before the steps did."""


def train(
    base: Base,
    tensors: Tensors,
    examples: Examples,
    local: Local,
    privacy: Privacy,
    seed: int,
    ledger: Ledger | None = None,
    *,
    rounds: int = 1,
    entropy: int | None = None,
) -> Learned:
    """Learn from a client's examples (AdamW, Loshchilov and Hutter 2019; its state does not outlive the round).

    Given   tensors: to begin with; those of the base are overwritten
            seed: of the order of the examples; with ``privacy.unit`` "example" nothing is drawn from it
            ledger: what the client has released before
            rounds: that the budget is to last for, where ``privacy.noise`` is None
            entropy: what example-level sampling and noise are drawn from, for tests and benchmarks; None: the system's

    Raises:
        InputError: there is nothing to learn from, the tensors are not the base's, a loss is not finite, or the budget
            cannot be kept by any noise.
        MissingComponentError: privacy needs Opacus, and it is not installed.
    """
    if not len(examples):
        raise InputError("there is nothing to learn from: the client has no example")
    put(base, tensors)
    if privacy.unit == "example":
        from slm_export.federated.private_steps import private_steps

        return private_steps(base, examples, local, privacy, ledger or Ledger(), rounds, entropy)
    before = _loss_now(base, examples)
    optimizer = optimizer_of(base, local)
    for batch in _batches(examples.rows, local, seed, base.tokenizer.pad_id):
        loss = losses(base, batch).mean()
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()}; lower rate = {local.rate:g}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Learned(taken(base), len(examples), local.steps, before, _loss_now(base, examples), ledger)


@torch.no_grad()
def measure(base: Base, tensors: Tensors, examples: Examples) -> Interval:
    """Return the mean loss in nats: by token of a model that writes text, by text of a classifier.

    Raises:
        InputError: the tensors are not the base's.
    """
    put(base, tensors)
    sums, counts = [], []
    for batch in batches(examples.rows, base.tokenizer.pad_id):
        nats, seen = _nats(base, batch)
        sums += nats.sum(1).tolist()
        counts += seen.sum(1).tolist()
    return mean(sums, counts, documents_of(examples.rows))


def losses(base: Base, batch: Batch) -> Tensor:
    """Return the loss of every example in nats, mean over its own tokens; float32 (examples,)."""
    nats, seen = _nats(base, batch)
    return nats.sum(1) / seen.sum(1).clamp_min(1)


def optimizer_of(base: Base, local: Local) -> torch.optim.Optimizer:
    """Return what moves the tensors."""
    return torch.optim.AdamW(base.parameters.values(), lr=local.rate, weight_decay=0.0)


def difference(learned: Tensors, begun: Tensors) -> dict[str, NDArray[np.float32]]:
    """Return what was learned, less what it began with."""
    return {name: learned[name] - begun[name] for name in begun}


def _nats(base: Base, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return -ln p of every label, 0 where none is, and 1 where one is; float32 (examples, labels)."""
    logits = base.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    if base.task == CLASSIFICATION:
        logits, labels = logits[:, None], batch["labels"][:, None]
    else:
        logits, labels = logits[:, :-1], labels_of(batch)[:, 1:]
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nats.view(labels.shape), (labels != IGNORED).float()


def _batches(rows: Sequence[Example], local: Local, seed: int, pad_id: int) -> Iterator[Batch]:
    """Yield one batch for every step; every epoch holds each example once, in another order."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(local.steps):
        while len(order) < local.batch:
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = order[: local.batch], order[local.batch :]
        yield collate([rows[index] for index in chosen], pad_id)


@torch.no_grad()
def _loss_now(base: Base, examples: Examples) -> float:
    rows = spread(examples.rows, _MEASURED)
    found = [losses(base, batch) for batch in batches(rows, base.tokenizer.pad_id)]
    return float(torch.cat(found).mean())
