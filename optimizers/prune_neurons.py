"""Take the neurons out of MLPs that matter least.

Given   Dense matrices of an MLP: gate and up (neurons, in), down (out, neurons)
Result  the same with fewer neurons, down refitted by least squares on calibration text; layers may differ in width

What ranks them and what decides how many a layer loses: `narrowing`. Widths stay multiples of ``multiple``, so that
groups of columns still divide them and kernels have whole tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.geometry import Parts, mlps
from slm_export.compression.narrowing import Wanted, count, narrowed
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError
from slm_export.weights import GROUPS


@dataclass(frozen=True)
class PruneNeurons:
    """Options: the share of neurons that goes, the multiple that widths stay, whether all layers lose alike."""

    name: ClassVar[str] = "prune-neurons"
    calibrated: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = True

    fraction: float = 0.2
    multiple: int = 0
    """0: the largest group of the grid that divides the width, so that any group size fits afterwards."""
    uniform: bool = False
    """False: measured, layer by layer. No format minds; layers of one width convert faster."""
    tokens: int = 16_384
    """Of calibration text that down is refitted on."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InputError(f"prune-neurons: fraction must be between 0 and 1, not {self.fraction!r}")
        if self.multiple < 0:
            raise InputError(f"prune-neurons: multiple must not be negative, and is {self.multiple}")
        if self.tokens < 1:
            raise InputError(f"prune-neurons: tokens must be positive, and is {self.tokens}")

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse families whose MLPs are not known, and a fraction that is none or all in multiples."""
        layers = mlps(checkpoint, self.name)
        count(layers, self._wanted(layers))

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Measure, choose, cut and refit."""
        layers = mlps(checkpoint, self.name)
        return narrowed(checkpoint, layers, self._wanted(layers), work)

    def _wanted(self, layers: Sequence[Parts]) -> Wanted:
        dividing = [g for g in GROUPS if not any(parts.count % g for parts in layers) and g < layers[0].count]
        multiple = self.multiple or max(dividing, default=1)
        return Wanted(self.name, "neurons", self.fraction, multiple, self.uniform, self.tokens)
