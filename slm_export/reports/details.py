"""What a report tells in detail: every weight, examples of divergence, a prediction, a frontier.

Plain frozen values; `results.Report` holds them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightRow:
    """One weight as the artifacts carry it."""

    name: str
    role: str
    """embedding, head, table, linear or other; see `checkpoint.Role`."""
    layer: int | None
    """Number of the block that it is in; None outside."""
    part: str
    """What it is within its block, or altogether: ``self_attn.q_proj``."""
    values: int
    bits: int
    """Of one stored value: code, index or float."""
    bytes: int
    """With its scales or tables."""
    error: float | None = None
    """Relative squared error |w - w'|^2 / |w|^2 of the last pass that changed it; None where none can be told."""


@dataclass(frozen=True)
class Divergence:
    """A place where an artifact and its source would go on differently after the same text."""

    where: str
    """held-out text, or the artifact's own text."""
    before: str
    """The end of the text up to there."""
    source: str
    """The token that the source prefers there."""
    source_probability: float
    artifact: str
    artifact_probability: float
    kl: float | None = None
    """From the source's distribution to the artifact's, nats."""
    after: str = ""
    """How the text goes on."""


@dataclass(frozen=True)
class Furthest:
    """A text on which an encoder artifact is far from its source."""

    text: str
    value: float
    """Cosine of the embeddings, or largest difference of the scores."""


@dataclass(frozen=True)
class PredictedPhase:
    """One kind of work of an artifact under the roofline: what it takes, and how long that is predicted to last."""

    name: str
    """decode, or prefill of 128 tokens."""
    operations: float
    """Multiplications and additions, each one operation."""
    bytes: float
    """Read from memory and written to it."""
    predicted_s: float
    measured_s: float | None = None


@dataclass(frozen=True)
class Prediction:
    """What a model of a machine says of an artifact's speed (Williams et al. 2009, the roofline model)."""

    where: str
    """The machine that is modelled."""
    bytes_per_s: float
    operations_per_s: float
    phases: tuple[PredictedPhase, ...]
    source: str = ""
    """Where the two rates are from."""


@dataclass(frozen=True)
class FrontierPoint:
    """One recipe on the frontier of size against quality. Predicted and measured stay apart."""

    label: str
    bytes: int
    predicted_perplexity_ratio: float | None = None
    measured_perplexity_ratio: float | None = None
    chosen: bool = False
    """Whether this is the recipe that was exported."""
