"""What a model is adapted by: its examples, its loss, and the figures that tell before from after.

    causal      the next token of plain text                                     decoders
    masked      hidden tokens of plain text (Devlin et al., "BERT", 2018)        encoders
    generate    the answer behind a prompt                                       decoders
    classify    one class of a text                                              encoders
    tag         one class of each word                                           encoders
    embed       which of a batch of texts belongs to which (contrastive)         encoders

Each is a class with the face of `Objective`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from slm_export.learning.measures import Interval
from slm_export.learning.models import Model
from slm_export.learning.trainer import Example, Loss


class Objective(Protocol):
    """One of the above, for one model and one set of examples."""

    start: Model
    """The model that learns, its head put on."""
    training: Sequence[Example]
    held_out: Sequence[Example]
    loss: Loss
    whole: tuple[str, ...]
    """Parts that are new, and therefore learned as a whole beside adapters of low rank."""
    notes: tuple[str, ...]

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return the figures of a model like ``start`` on the held-out examples."""

    def result(self, model: Model) -> Model:
        """Return what is kept of the model that has learned."""
