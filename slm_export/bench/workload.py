"""What is asked of an artifact: prompts to read, depths to generate at, how often, on how many threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slm_export.errors import InputError

GENERATED = 64
"""Tokens that are generated at every depth."""
PREFILL, DEPTH = (128, 512), (0, 128, 512)
"""What is measured unless asked otherwise, as far as it fits the context."""


@dataclass(frozen=True)
class Turn:
    """A prompt that is read into an empty context, and tokens that are generated after it; of an encoder, one call."""

    prompt: int
    generated: int


@dataclass(frozen=True)
class Workload:
    """Token counts are of the artifact's own tokens; ``None`` leaves a choice to what fits."""

    threads: int
    runs: int = 5
    prefill: tuple[int, ...] | None = None
    depth: tuple[int, ...] | None = None
    sustained_s: float = 0.0

    @property
    def room(self) -> int:
        """Tokens of context that everything asked for needs."""
        return max((*(self.prefill or PREFILL), *(self.depth or DEPTH))) + GENERATED

    def turns(self, context: int, *, generates: bool = True) -> tuple[Turn, ...]:
        """Return the turns of one round, shortest prompt first.

        Raises:
            InputError: a length that was asked for does not fit the context.
        """
        if not generates:
            lengths = self._fitting(self.prefill, PREFILL, context, "--prefill")
            return tuple(Turn(length, 0) for length in lengths)
        prompts = self._fitting(self.prefill, PREFILL, context - 1, "--prefill")
        depths = self._fitting(self.depth, DEPTH, context - 1, "--depth")
        # A context is never quite empty: the first token that is generated follows some token.
        every = sorted({max(1, tokens) for tokens in (*prompts, *depths)})
        return tuple(Turn(prompt, min(GENERATED, context - prompt)) for prompt in every)

    def wants_prefill(self, prompt: int) -> bool:
        """Whether reading a prompt of this length was asked for."""
        return prompt in self.prefill if self.prefill is not None else prompt > 1

    def depth_of(self, prompt: int) -> int | None:
        """Return the depth at which generating after this prompt counts; None where it was not asked for."""
        asked = self.depth if self.depth is not None else (*DEPTH, prompt)
        return next((depth for depth in sorted(asked) if max(1, depth) == prompt), None)

    def _fitting(
        self, asked: Sequence[int] | None, usual: Sequence[int], most: int, option: str
    ) -> Sequence[int]:
        if asked is None:
            return [tokens for tokens in usual if tokens <= most] or [max(1, most // 2)]
        if too_long := [tokens for tokens in asked if tokens > most]:
            raise InputError(
                f"{option} {too_long[0]}: the artifact has room for {most} tokens there; ask for fewer"
            )
        return asked
