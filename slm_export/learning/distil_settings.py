"""What a distillation is asked to do, beside the loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slm_export.learning.settings import Frozen, Training
from slm_export.learning.shapes import Shape

Kind = Literal["forward", "reverse", "jsd"]


class DecoderLosses(Frozen):
    """How a decoder is held against its teacher."""

    temperature: float = Field(default=1.0, gt=0)
    hard: float = Field(default=0.1, ge=0, le=1)
    """Share of the cross entropy of the text itself."""
    divergence: Kind = "forward"
    """KL from the teacher's probabilities, to them, or the generalised Jensen-Shannon divergence halfway."""
    top_k: int = Field(default=0, ge=0)
    """Write down the teacher's k largest probabilities once, and read them from disk; 0: ask it at every step."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of steps on text that the student writes itself (generalised knowledge distillation)."""


class EncoderLosses(Frozen):
    """How an encoder is held against its teacher: weights of losses, 0 leaves one out."""

    embedding: float = Field(default=1.0, ge=0)
    """1 - cosine of the pooled vectors."""
    contrastive: float = Field(default=0.1, ge=0)
    """Likeness of every text to all others of the batch, as the teacher sees it."""
    contrast_temperature: float = Field(default=0.05, gt=0)
    hidden: float = Field(default=1.0, ge=0)
    """1 - cosine of the tokens' vectors, layer by layer (DistilBERT, TinyBERT)."""
    attention: float = Field(default=0.1, ge=0)
    """KL divergence of the attention of the last layers (MiniLM)."""
    output: float = Field(default=1.0, ge=0)
    """KL divergence of scores, of encoders that give scores."""


class Grid(Frozen):
    """The integer grid that is trained against."""

    bits: Literal[4, 8]
    group: Literal[32, 64, 128, 256] = 32
    embedding_bits: Literal[4, 8] = 8
    begins: float = Field(default=0.5, ge=0, lt=1)
    """Share of the steps that come before it, in floats."""
    search_every: int = Field(default=4, ge=1)
    """Steps between searches for scales."""


class DistilSettings(Frozen):
    """All of it; the manifest's record of a run."""

    training: Training = Training()
    shape: Shape | None = None
    decoder: DecoderLosses = DecoderLosses()
    encoder: EncoderLosses = EncoderLosses()
    grid: Grid | None = None
