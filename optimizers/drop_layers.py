"""Take whole layers away: those whose absence changes least what the model says.

Given   a model of numbered layers that feed each other
Result  the same without some of them, numbered anew; the configuration lists fewer

Layers go one by one. Each time every layer that is left is tried: the model without it reads calibration text, and the
one goes whose absence brings the model least away from its source. Where a layer stands says little about that, and
what two take away together is not what each takes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.depth import refuse_changed, stacks_of, with_layers
from slm_export.compression.distance import Distance
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError


@dataclass(frozen=True)
class DropLayers:
    """Options: how many layers go, or their share; the text that is measured on."""

    name: ClassVar[str] = "drop-layers"
    calibrated: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = True

    count: int = 0
    """0: as ``fraction`` says."""
    fraction: float = 0.0
    """Of the layers, rounded; at least one goes."""
    tokens: int = 2048
    """Of calibration text that every trial is measured on."""

    def __post_init__(self) -> None:
        if (self.count > 0) == (self.fraction > 0) or self.count < 0 or not 0 <= self.fraction < 1:
            raise InputError(
                "drop-layers: give count, how many layers go, or fraction, their share between 0 and 1; one alone "
                f"(count is {self.count}, fraction {self.fraction:g})"
            )
        if self.tokens < 1:
            raise InputError(f"drop-layers: tokens must be positive, and is {self.tokens}")

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse models without layers of their own, with too few, or whose layers depend on their place."""
        count, _ = stacks_of(checkpoint, self.name)
        number = self._number(count)
        if number >= count:
            raise InputError(
                f"drop-layers: {number} layers are to go, and {checkpoint.name} has {count}; one must stay"
            )
        shifted = range(1, count)  # every layer that stays has another number
        refuse_changed(checkpoint, with_layers(checkpoint, shifted, self.name), shifted, self.name)

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Try, choose, and number the rest anew."""
        text = work.text(self.name)
        count, stacks = stacks_of(checkpoint, self.name)
        distance = Distance(checkpoint, text.learning, self.tokens)
        kept, costs = list(range(count)), []
        for _ in range(self._number(count)):
            tried = {}
            for layer in kept:
                work.advance(0, f"without layer {layer}")
                without = with_layers(checkpoint, [each for each in kept if each != layer], self.name)
                tried[layer] = distance.to(without)
            least = min(tried, key=lambda layer: tried[layer])
            kept.remove(least)
            costs.append((least, tried[least]))
        made = with_layers(checkpoint, kept, self.name)
        refuse_changed(checkpoint, made, kept, self.name)
        # A weight whose layer keeps its number is the same weight under the same name.
        skipped = {
            name: "stays, under its name"
            if name.startswith(tuple(f"{s}." for s in stacks))
            else "in no layer"
            for name, weight in checkpoint.weights.items()
            if made.weights.get(name) is weight
        }
        gone = ", then ".join(f"{layer} ({cost:.4g})" for layer, cost in costs)
        held_out = Distance(checkpoint, text.held_out, 2 * self.tokens)
        note = (
            f"of {count} layers removed: {gone}, in brackets {distance.words} from the model before; without them all "
            f"{held_out.to(made):.4g} on calibration text that nothing was chosen by"
        )
        return PassResult(made, skipped, (note,))

    def _number(self, count: int) -> int:
        return self.count or max(1, round(self.fraction * count))
