"""A compressed model that learns from the model it was made of.

Teacher   the source's outputs on token ids of the compressed model
Student   the compressed model with what may be learned of it, and how far it is from its teacher
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.compression.adapter import Adapter
from slm_export.compression.blocks import LiveDialect, LiveLinear, checkpoint_path, linears_of, run_model
from slm_export.compression.latent import Latent
from slm_export.graph.model import Encoder, build_reference
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import EMBEDDING
from slm_export.weights import Dense, Quantized, Weight

_BATCH = 1024  # tokens that go through at a time: logits of a large vocabulary are the largest tensors


def batches_of(windows: Iterable[Sequence[int]]) -> list[Tensor]:
    """Return windows of equal lengths together, int64 (windows, tokens)."""
    batches: list[Tensor] = []
    for length, alike in groupby(sorted(windows, key=len), len):
        batches += torch.split(torch.tensor(list(alike)), max(1, _BATCH // length))
    return batches


class Teacher:
    """The source model. What a compressed one lacks of its vocabulary is left out of its probabilities too."""

    def __init__(self, source: Checkpoint, compressed: Checkpoint) -> None:
        self._model = build_reference(source)
        kept = compressed.vocabulary
        self._tokens = None if kept is None else torch.tensor(kept.tokens)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return the source's output for the compressed model's ids (windows, tokens)."""
        output = _output(self._model, ids if self._tokens is None else self._tokens[ids])
        whole = self._tokens is None or output.shape[-1] <= int(self._tokens.max())
        return output if whole else output[..., self._tokens]


class Student:
    """A compressed model, and what may be learned of it.

    Of matrices on the grid that is codes and scales, of matrices of floats a factor on each row and a change of low
    rank; norms and biases of all.
    """

    def __init__(self, checkpoint: Checkpoint, *, codes: bool, others: bool, rank: int = 0) -> None:
        self._checkpoint = checkpoint
        self._model = build_reference(checkpoint, dialect=LiveDialect())
        self._originals = load_checkpoint(checkpoint.folder).weights if codes else {}
        self._latents: dict[str, tuple[LiveLinear, Latent]] = {}
        self._adapters: dict[str, tuple[LiveLinear, Adapter]] = {}
        self._vectors: dict[str, Tensor] = {}
        for name, linear in linears_of(self._model, "").items():
            self._take(name, linear, rank if rank or others else None)
        if others:
            self._take_vectors()
        adapters = [adapter for _, adapter in self._adapters.values()]
        self.codes = [latent.codes for _, latent in self._latents.values()] if codes else []
        """What is learned in units of a step."""
        self.others = [latent.factors for _, latent in self._latents.values()] if others else []
        self.others += [adapter.factors for adapter in adapters] if others else []
        self.others += self._vectors.values()
        """Scales, factors, norms and biases."""
        self.thin = [part for each in adapters for part in (each.up, each.down)] if rank else []
        """The matrices of low rank."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights that are learned."""
        return (*self._latents, *self._adapters, *self._vectors)

    @property
    def _matrices(self) -> dict[str, tuple[LiveLinear, Latent | Adapter]]:
        return {**self._latents, **self._adapters}

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        """Return the mean distance to the teacher's output: 1 - cosine of embeddings, KL divergence of all else."""
        for linear, learned in self._matrices.values():
            linear.matrix = learned.matrix()
        output = _output(self._model, ids)
        if self._checkpoint.task == EMBEDDING:
            return (1 - F.cosine_similarity(output, target, dim=-1)).mean()
        p, q = target.log_softmax(-1), output.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    def clip(self) -> None:
        """Bring back what left the range of codes."""
        for _, latent in self._latents.values():
            latent.clip()

    def weights(self) -> dict[str, Weight]:
        """Return what has been learned, as it is now."""
        made: dict[str, Weight] = {name: each.weight() for name, (_, each) in self._matrices.items()}
        for name, vector in self._vectors.items():
            made[name] = _dense(vector.detach().clone())
        return made

    def _take(self, name: str, linear: LiveLinear, rank: int | None) -> None:
        weight, is_linear = linear.source, self._checkpoint.roles.get(name) == "linear"
        if isinstance(weight, Dense) and is_linear and rank is not None:
            self._adapters[name] = (linear, Adapter(weight, rank))
        elif isinstance(weight, Quantized) and is_linear:
            original = self._originals.get(name)
            near = original is not None and original.shape == weight.shape and _is_near(original, weight)
            latent = Latent(weight, original.float32() if original is not None and near else None)
            self._latents[name] = (linear, latent)
        else:
            linear.matrix = weight.float32()

    def _take_vectors(self) -> None:
        for path, part in self._model.named_modules():
            name = checkpoint_path(self._model, path)
            if isinstance(part, LiveLinear):
                if part.bias is not None and f"{name}.bias" in self._checkpoint.weights:
                    part.bias = self._vectors[f"{name}.bias"] = part.bias.clone().requires_grad_()
                continue
            for key, parameter in part.named_parameters(recurse=False):
                if self._checkpoint.roles.get(f"{name}.{key}") == "other":
                    self._vectors[f"{name}.{key}"] = parameter.requires_grad_()


def _output(model: nn.Module, ids: Tensor) -> Tensor:
    """Return float32 logits (windows, tokens, vocabulary), or an encoder's output."""
    made: Any = run_model(model, ids)
    output: Tensor = made if isinstance(model, Encoder) else made.logits
    return output


def _is_near(original: Weight, weight: Quantized) -> bool:
    """Whether a matrix is the other one rounded; it is not, where a pass between them scaled or rotated it."""
    exact, rounded = original.float32(), weight.float32()
    return bool((exact - rounded).square().sum() < 0.1 * exact.square().sum())


def _dense(values: Tensor) -> Dense:
    return Dense(tuple(values.shape), values.dtype, lambda: values)
