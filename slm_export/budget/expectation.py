"""What is expected of a model in every allocation of bits, and corrected by what is measured.

    loss   decoders: increase of the mean log perplexity; embeddings: 1 - mean cosine; scores: KL divergence

A loss is the sum of the costs of all choices (`sensitivity`), times a factor, and what does not depend on them: the
runtime's rounding of activations, and what the passes before the quantization took away. The factor is 1 until an
artifact has been measured: where a text is one that the source itself could have written, the increase of log
perplexity is the KL divergence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slm_export.budget import costs
from slm_export.budget.allocation import Limit, solve
from slm_export.budget.budget import Budget
from slm_export.budget.choices import Allocation, Choice, options_for
from slm_export.budget.costs import FORMATS, Speed, total
from slm_export.budget.sensitivity import Costs
from slm_export.checkpoint import Checkpoint
from slm_export.results import EmbeddingQuality, FormatResult, TokenLatency, TokenQuality
from slm_export.source.tasks import EMBEDDING, GENERATION

_MARGIN = 0.95
"""A bound on quality is aimed at a little inside: what is predicted is not exact, and a miss costs an export."""


@dataclass(frozen=True)
class Loss:
    """From the sum of the costs of choices to the loss of an artifact."""

    costs: Costs
    base: float = 0.0
    """Of the passes before the quantization, measured on the same text."""
    factor: float = 1.0
    rounding: float = 0.0

    def of(self, allocation: Allocation) -> float:
        """Return the loss that is expected of an allocation."""
        return self.base + self.rounding + self.factor * total(self.costs, allocation)

    def room(self, limit: float) -> float:
        """Return what costs may add up to, for a loss within a limit."""
        return (limit - self.base - self.rounding) / self.factor

    def corrected(self, allocation: Allocation, result: FormatResult) -> Loss:
        """Return the loss that is expected after an artifact of this allocation was measured."""
        measured = loss_of(result)
        expected = total(self.costs, allocation)
        if measured is None or expected <= 0:
            return self
        share = 1.0
        if isinstance(result.quality, TokenQuality) and result.quality.kl_mean:
            # The rest is of the runtime, which rounds activations whatever the weights are.
            share = min(1.0, (result.quality.quantization_kl_mean or 0.0) / result.quality.kl_mean)
        factor = max((measured * share - self.base) / expected, 1e-3)
        return replace(self, factor=factor, rounding=measured * (1 - share))


@dataclass(frozen=True)
class Expectation:
    """What is known, measured or guessed of the artifacts of one checkpoint."""

    checkpoint: Checkpoint
    formats: tuple[str, ...]
    options: Mapping[str, tuple[Choice, ...]]
    encoded: Mapping[str, costs.Bytes]
    """By format."""
    program: Mapping[str, float]
    """Bytes of a file beside the matrices that are chosen for."""
    memory: Mapping[str, float]
    """Bytes of a process beside those that grow with the file."""
    reads: costs.Bytes
    speed: Speed | None = None
    loss: Loss | None = None

    @staticmethod
    def of(
        checkpoint: Checkpoint, formats: Sequence[str], speed: Speed | None, state_bytes: int
    ) -> Expectation:
        """Return what headers alone tell.

        Given   state_bytes: of the KV cache
        """
        options = options_for(checkpoint)
        return Expectation(
            checkpoint,
            tuple(formats),
            options,
            {name: costs.encoded(checkpoint, options, name) for name in formats},
            {name: costs.program_bytes(checkpoint, options, name) for name in formats},
            {name: FORMATS[name].runtime_mb * 2**20 + state_bytes for name in formats},
            costs.read_per_token(checkpoint, options),
            speed,
        )

    def size(self, format: str, allocation: Allocation) -> float:
        """Return the bytes of a file."""
        return self.program[format] + total(self.encoded[format], allocation)

    def figures(self, format: str, allocation: Allocation) -> dict[str, float]:
        """Return what is expected of an artifact, by the names that figures have in the manifest."""
        size = self.size(format, allocation)
        made = {
            "bytes": float(round(size)),
            "model_rss_mb": (self.memory[format] + FORMATS[format].memory * size) / 2**20,
        }
        if self.speed is not None:
            made["decode_tokens_per_s"] = self.speed.tokens_per_s(total(self.reads, allocation))
        if self.loss is not None and self.checkpoint.task == GENERATION:
            made["perplexity_ratio"] = math.exp(min(self.loss.of(allocation), 700.0))
        elif self.loss is not None and self.checkpoint.task == EMBEDDING:
            made["cosine_mean"] = 1 - self.loss.of(allocation)
        return made

    def limits(self, budget: Budget) -> list[Limit]:
        """Return the limits on cost of a budget, for every format."""
        found = []
        for name in self.formats:
            sizes, program = self.encoded[name], self.program[name]
            if budget.max_size is not None:
                found.append(Limit(f"size of {name}", sizes, program, budget.max_size))
            if budget.max_memory is not None:
                # In bytes of the file, so that all limits of a format are on one scale.
                room = (budget.max_memory - self.memory[name]) / FORMATS[name].memory
                found.append(Limit(f"memory of {name}", sizes, program, room))
        if budget.min_tokens_per_s is not None:
            assert self.speed is not None
            found.append(Limit("speed", self.reads, 0.0, self.speed.most_bytes(budget.min_tokens_per_s)))
        return found

    def allocate(self, budget: Budget) -> dict[str, Choice] | None:
        """Return the best allocation within a budget; None where there is none.

        The least loss within limits on cost. With a limit on quality alone, the smallest file within it.
        """
        assert self.loss is not None
        if budget.limits_cost:
            return solve(self.options, self.loss.costs, self.limits(budget))
        return self.smallest(loss_limit(budget), budget)

    def smallest(self, loss: float | None, budget: Budget | None = None) -> dict[str, Choice] | None:
        """Return the allocation of the smallest file whose expected loss is no larger."""
        assert self.loss is not None
        limits = []
        if loss is not None:
            limits.append(Limit("quality", self.loss.costs, 0.0, self.loss.room(_MARGIN * loss)))
        largest = max(self.formats, key=lambda name: self.program[name])
        return solve(self.options, self.encoded[largest], limits)

    def least(self) -> dict[str, Choice]:
        """Return the allocation that takes the least of everything."""
        return {
            name: min(choices, key=lambda c: self.encoded[self.formats[0]][name][c])
            for name, choices in self.options.items()
        }

    def missed(self, budget: Budget) -> Limit | None:
        """Return a limit on cost that the least allocation exceeds for certain; None where all may be kept to."""
        least = self.least()
        over = (limit for limit in self.limits(budget) if limit.of(least) - limit.fixed > limit.limit)
        return next(over, None)

    def corrected(self, allocation: Allocation, results: Sequence[FormatResult]) -> Expectation:
        """Return what is expected after artifacts of an allocation were measured."""
        program, memory, speed, loss = dict(self.program), dict(self.memory), self.speed, self.loss
        losses = []
        for result in results:
            name, size = result.artifact.format, result.artifact.bytes
            program[name] = size - total(self.encoded[name], allocation)
            latency = result.latency
            if latency is not None and latency.model_rss_mb is not None:
                memory[name] = latency.model_rss_mb * 2**20 - FORMATS[name].memory * size
            if isinstance(latency, TokenLatency) and latency.decode_tokens_per_s and speed is not None:
                speed = speed.corrected(latency.decode_tokens_per_s, total(self.reads, allocation))
            if self.loss is not None:
                losses.append(self.loss.corrected(allocation, result))
        if losses:
            # The worst of the formats: all have the same weights.
            loss = max(losses, key=lambda one: one.of(allocation))
        return replace(self, program=program, memory=memory, speed=speed, loss=loss)


def loss_of(result: FormatResult) -> float | None:
    """Return the loss of an artifact as it was measured."""
    quality = result.quality
    if isinstance(quality, TokenQuality) and quality.perplexity_ratio is not None:
        return math.log(quality.perplexity_ratio)
    if isinstance(quality, EmbeddingQuality) and quality.cosine_mean is not None:
        return 1 - quality.cosine_mean
    return None


def loss_limit(budget: Budget) -> float | None:
    """Return the loss that a budget allows."""
    if budget.max_perplexity_ratio is not None:
        return math.log(budget.max_perplexity_ratio)
    return None if budget.min_cosine is None else 1 - budget.min_cosine
