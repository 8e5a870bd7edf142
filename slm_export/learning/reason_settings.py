"""What decides the outcome of tuning on reasoning."""

from __future__ import annotations

from pydantic import Field

from slm_export.learning.distil_settings import Grid
from slm_export.learning.settings import Frozen, Training


class Reasoning(Frozen):
    """How a teacher is asked, what is kept of its answers, and how the child learns from that."""

    training: Training = Training()
    samples: int = Field(default=4, ge=1, le=64)
    """Solutions of each problem that the teacher is asked for."""
    shortest: bool = False
    """Keep only the shortest right solution of a problem."""
    answer_tokens: int = Field(default=512, ge=1)
    """Tokens that the child may write when it is scored."""
    low_rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0: the whole model learns."""
    grid: Grid | None = None
    """What it is trained for; None: no grid."""
