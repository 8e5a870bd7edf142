"""What decides the outcome of adapting a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slm_export.learning.distil_settings import Grid
from slm_export.learning.settings import Frozen, Training

Task = Literal["classify", "tag", "embed", "generate"]


class AdaptSettings(Frozen):
    """All of it; the manifest's record of a run."""

    training: Training = Training()
    task: Task | None = None
    """What labelled examples teach; None: the text teaches itself."""
    low_rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0: the whole model learns."""
    masked: float = Field(default=0.15, gt=0, lt=1)
    """Share of an encoder's tokens that are hidden from it, where the text teaches itself."""
    grid: Grid | None = None
    """What it is trained for; None: no grid."""
