"""Take key-value heads out of attention, with the query heads that read them.

Given   Dense matrices of attention: query (heads * width, in), key and value (groups * width, in), output
        (out, heads * width)
Result  the same with fewer groups, output refitted by least squares on calibration text; caches are smaller as well

What ranks them and what decides how many a layer loses: `narrowing`. Of every layer at least one group stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.geometry import attentions
from slm_export.compression.narrowing import Wanted, count, narrowed
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError


@dataclass(frozen=True)
class PruneKvGroups:
    """Options: the share of key-value groups that goes, whether all layers lose alike."""

    name: ClassVar[str] = "prune-kv-groups"
    calibrated: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = True

    fraction: float = 0.25
    uniform: bool = True
    """False: measured, layer by layer. ONNX and Core ML then refuse a decoder: they have caches of one shape."""
    tokens: int = 16_384
    """Of calibration text that the output is refitted on."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InputError(f"prune-kv-groups: fraction must be between 0 and 1, not {self.fraction!r}")
        if self.tokens < 1:
            raise InputError(f"prune-kv-groups: tokens must be positive, and is {self.tokens}")

    @property
    def _wanted(self) -> Wanted:
        return Wanted(self.name, "key-value groups", self.fraction, 1, self.uniform, self.tokens)

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse families whose attention is not known, and a fraction that is no group or all of them."""
        count(attentions(checkpoint, self.name), self._wanted)

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Measure, choose, cut and refit."""
        return narrowed(checkpoint, attentions(checkpoint, self.name), self._wanted, work)
