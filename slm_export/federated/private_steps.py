"""DP-SGD (Abadi et al., 2016) on a client, by Opacus: whether a text was among its examples cannot be told.

A step takes every example with the same probability, clips the gradient of each, adds noise to their sum, and divides
by the number that was expected: the mechanism that `accounting` counts. Opacus's hooks give the gradients by example:
what learns are linear layers, of peft or of a head, and the frozen rest of transformers' model needs none. They are set
on those layers alone, since Opacus wants layers that train, and the rest is to stay in evaluation mode.
"""

from __future__ import annotations

import itertools
import random
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from slm_export.errors import InputError, MissingComponentError
from slm_export.federated.accounting import Budget, Ledger, noise_for
from slm_export.federated.base import Base, taken
from slm_export.federated.examples import Examples
from slm_export.federated.local import Learned, losses, optimizer_of
from slm_export.federated.noise import gaussian
from slm_export.federated.settings import Local, Privacy
from slm_export.learning.trainer import Example, collate

_noise_for = lru_cache(maxsize=32)(noise_for)


def private_steps(
    base: Base,
    examples: Examples,
    local: Local,
    privacy: Privacy,
    ledger: Ledger,
    rounds: int,
    entropy: int | None,
) -> Learned:
    """Make the steps that the budget allows, from the tensors that the base has; see `local.train`."""
    assert privacy.epsilon is not None
    assert privacy.delta is not None
    rate = min(1.0, local.batch / len(examples))
    noise = privacy.noise or _noise_for(
        privacy.epsilon, privacy.delta, rate, rounds * local.steps, privacy.accountant
    )
    budget = Budget(privacy.epsilon, privacy.delta, privacy.accountant)
    steps = budget.most(ledger, noise, rate, local.steps)
    if steps:
        _steps(base, examples, local, privacy.clip, noise, steps, entropy)
    return Learned(
        taken(base),
        len(examples),
        steps,
        ledger=ledger.plus(noise, rate, steps),
        exhausted=steps < local.steps,
    )


def _steps(
    base: Base,
    examples: Examples,
    local: Local,
    clip: float,
    noise: float,
    steps: int,
    entropy: int | None,
) -> None:
    expected = min(local.batch, len(examples))
    chance = secrets.SystemRandom() if entropy is None else random.Random(entropy)
    with gradients_by_example(base):
        optimizer = _noised(base, local, clip, noise, expected, entropy)
        for _ in range(steps):
            _clip_and_sum(base, poisson(examples.rows, expected, chance), local, optimizer)
            optimizer.step()
            optimizer.zero_grad()


def poisson(rows: Sequence[Example], expected: int, chance: random.Random) -> list[Example]:
    """Return rows, each taken by itself with the probability at which so many are expected in all."""
    return [row for row in rows if chance.random() * len(rows) < expected]


def _noised(base: Base, local: Local, clip: float, noise: float, expected: int, entropy: int | None) -> Any:
    """Return Opacus's optimizer, with noise that nobody can foresee."""
    from opacus.optimizers import DPOptimizer

    numbers = itertools.repeat(None) if entropy is None else itertools.count(entropy + 1)

    class Noised(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
        def add_noise(self) -> None:
            for parameter in self.params:
                drawn = torch.from_numpy(gaussian(tuple(parameter.shape), next(numbers)))
                summed = parameter.summed_grad.double() + noise * clip * drawn
                parameter.grad = summed.to(parameter.dtype).view_as(parameter)

    return Noised(
        optimizer_of(base, local),
        noise_multiplier=noise,
        max_grad_norm=clip,
        expected_batch_size=expected,
    )


def _clip_and_sum(base: Base, drawn: Sequence[Example], local: Local, optimizer: Any) -> None:
    """Leave the gradients of all examples of a step with the optimizer: as many at a time as a step has on average.

    By chance there may be more in a step, or none at all; a step of none is noise alone, and is made like any other.
    """
    if not drawn:
        for parameter in optimizer.params:
            parameter.grad_sample = torch.zeros((0, *parameter.shape))
        return
    parts = [drawn[at : at + local.batch] for at in range(0, len(drawn), local.batch)]
    for number, part in enumerate(parts):
        loss = losses(base, collate(part, base.tokenizer.pad_id)).sum()
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()}; lower rate = {local.rate:g}")
        loss.backward()  # type: ignore[no-untyped-call]
        if number + 1 < len(parts):
            optimizer.signal_skip_step()
            optimizer.step()
            optimizer.zero_grad()


@contextmanager
def gradients_by_example(base: Base) -> Iterator[None]:
    """While it lasts, a backward pass of a sum of losses leaves ``grad_sample`` (examples, ...) with what learns.

    Raises:
        InputError: something learns that is no linear layer.
        MissingComponentError: Opacus is not installed.
    """
    try:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks
    except ImportError as error:
        raise MissingComponentError(
            f'privacy.unit = "example" needs opacus, which cannot be imported ({error}); '
            "pip install 'slm-export[federated]'"
        ) from error
    layers = {
        path: layer
        for path, layer in base.module.named_modules()
        if any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    }
    if strange := [path for path, layer in layers.items() if not isinstance(layer, torch.nn.Linear)]:
        raise InputError(
            f'{strange[0]} is no linear layer, and privacy.unit = "example" needs the gradient of each example; '
            "leave it out of targets"
        )
    hooks = GradSampleHooks(base.module, loss_reduction="sum")
    for layer in layers.values():
        layer.train()
    try:
        with warnings.catch_warnings():
            # The first layer's input has no gradient, and needs none.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooks.cleanup()
        for layer in layers.values():
            layer.eval()
