"""How long, how fast and on what a model learns: plain values that are recorded with the result."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Schedule = Literal["cosine", "linear", "constant"]


class Frozen(BaseModel):
    """Settings: unknown names are errors, and nothing changes after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def recorded(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return self.model_dump(mode="json")


class Training(Frozen):
    """The loop that every way of teaching shares."""

    steps: int = Field(default=200, ge=1)
    """Updates of the weights."""
    batch: int = Field(default=16, ge=1)
    """Examples in each step, over all processes."""
    together: int = Field(default=16, ge=1)
    """Examples that go through at a time in one process; fewer take less memory and give the same step."""
    length: int = Field(default=256, ge=8)
    """Tokens of an example at most."""
    rate: float = Field(default=5e-4, gt=0)
    """Largest learning rate (AdamW, Loshchilov and Hutter 2019)."""
    schedule: Schedule = "cosine"
    """How the rate falls to 0 after warming up; constant: it does not."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    largest_gradient: float = Field(default=1.0, gt=0)
    """Norm that gradients are clipped to."""
    seed: int = Field(default=0, ge=0)
    """Of the order of examples, of dropout and of new weights."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: twenty in all, and at least one for every 50 steps."""
    measure_every: int = Field(default=0, ge=0)
    """Steps between measurements on held-out text; 0: eight in all."""

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints, at least 1."""
        return self.checkpoint_every or max(1, min(50, self.steps // 20))

    @property
    def measure_steps(self) -> int:
        """Steps between measurements, at least 1."""
        return self.measure_every or max(1, self.steps // 8)
