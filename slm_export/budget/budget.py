"""What an artifact may cost and how good it has to be, as a user says it: ``--max-size 600MB``.

    max_size              bytes of every artifact
    max_memory            bytes that a model takes of the machine that runs it
    min_tokens_per_s      decoding, of one stream
    max_perplexity_ratio  decoders: perplexity of the artifact, divided by that of the source
    min_cosine            encoders of embeddings: mean cosine to the source

Costs are limits that the best model within them is looked for; a bound on quality alone asks for the smallest
model within it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from slm_export.errors import InputError
from slm_export.gates import Gates

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?|\.\d+)\s*(?P<unit>[a-z]+)?", re.IGNORECASE)


def parse_bytes(text: str, where: str) -> int:
    """Return a number of bytes: ``600MB`` and ``0.6 GB`` are decimal, ``572MiB`` is binary.

    Raises:
        InputError: it is no size, has no unit or is 0; ``where`` is what the user wrote it behind.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else (match["unit"] or "").lower()
    if match is None or (unit and unit not in _UNITS):
        raise InputError(f"{where}: '{text}' is no size; write for example 600MB, 0.6GB or 572MiB")
    if not unit:
        raise InputError(f"{where}: '{text}' has no unit; write for example {text.strip()}MB")
    size = round(float(match["number"]) * _UNITS[unit])
    if size < 1:
        raise InputError(f"{where}: '{text}' is no room at all")
    return size


@dataclass(frozen=True)
class Budget:
    """Limits; None leaves a figure free."""

    max_size: int | None = None
    max_memory: int | None = None
    min_tokens_per_s: float | None = None
    max_perplexity_ratio: float | None = None
    min_cosine: float | None = None

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    @property
    def limits_cost(self) -> bool:
        """Whether size, memory or speed is limited, and not quality alone."""
        return any(limit is not None for limit in (self.max_size, self.max_memory, self.min_tokens_per_s))

    def over(self, base: Budget) -> Budget:
        """Return ``base`` with every limit that is set here replaced."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return Budget(**{**{f.name: getattr(base, f.name) for f in fields(self)}, **ours})

    def gates(self, measured_here: bool) -> Gates:
        """Return the limits as gates, which give the final verdict on what was measured.

        Given   measured_here: whether the machine at hand is the one that the budget is about
        """
        memory = None if self.max_memory is None else self.max_memory / 2**20
        return Gates(
            max_bytes=self.max_size,
            max_model_rss_mb=memory,
            min_decode_tokens_per_s=self.min_tokens_per_s if measured_here else None,
            max_perplexity_ratio=self.max_perplexity_ratio,
            min_cosine_mean=self.min_cosine,
        )

    def check(self) -> None:
        """Raise InputError for a limit that nothing can meet, whatever the model."""
        # Written so that NaN is refused.
        if self.max_perplexity_ratio is not None and not self.max_perplexity_ratio > 1:
            raise InputError(
                f"--max-perplexity-ratio {self.max_perplexity_ratio:g}: quantizing makes no model better, so the ratio "
                "must be above 1, such as 1.01"
            )
        if self.min_cosine is not None and not 0 < self.min_cosine < 1:
            raise InputError(f"--min-cosine {self.min_cosine:g}: must be between 0 and 1, such as 0.99")
        if self.min_tokens_per_s is not None and not self.min_tokens_per_s > 0:
            raise InputError(f"--min-tokens-per-s {self.min_tokens_per_s:g}: must be above 0")
