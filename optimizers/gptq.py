"""Quantize linear layers so that what they compute on calibration text changes least.

Given   Dense matrices of a model that is a sequence of blocks, and text
Result  as `group_quantize` has it, with other codes and scales in the linear layers of the blocks; what lies outside
        them (embeddings, heads) is what `group_quantize` makes of it

Blocks are taken in order, and within a block the layers in the order of their use: each is measured on what the
quantized layers before it make of the text, so that it makes their errors good as far as it can (Frantar et al.,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022). `rounding` says how one
matrix is rounded. A pass that was killed goes on behind the last block that it had finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, NoReturn

from slm_export.bundles.finished import Keeper
from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.blocks import CannotWalk
from slm_export.compression.blockwise import Block, Walk
from slm_export.compression.rounding import Compensation, round_matrix
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError, MachineError
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.weights import GROUPS, Dense, Weight


@dataclass(frozen=True)
class Gptq(GroupQuantize):
    """Options: those of group-quantize, and how hard each matrix is worked at."""

    name: ClassVar[str] = "gptq"
    calibrated: ClassVar[bool] = True
    targets: ClassVar[bool] = False
    """Whether ``round_block`` wants to know what the source's block makes of the source's hidden states."""

    damping: float = 0.01
    """Added to the diagonal of the measured second moments, as a share of its mean."""
    rounds: int = 2
    """Sweeps over codes and scales after the first feedback of errors; 0: GPTQ as published."""
    act_order: bool = True
    """Columns of large inputs first; groups stay those of contiguous columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise InputError(f"{self.name}: damping must be above 0 and at most 1, not {self.damping}")
        if not 0 <= self.rounds <= 20:
            raise InputError(f"{self.name}: rounds must be from 0 to 20, not {self.rounds}")

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Quantize the blocks in their order, then what is left of the checkpoint."""
        self.check(checkpoint)
        text = work.text(self.name)
        with work.folder() as folder:
            try:
                walk = Walk(checkpoint, text.learning, folder, targets=self.targets, advance=work.advance)
            except CannotWalk as error:
                rounded: dict[str, Weight] = {}
                notes: tuple[str, ...] = (f"matrices were rounded without calibration: {error}",)
            else:
                rounded, notes = self._walk(walk, checkpoint, work), ()
        rest = super().run(checkpoint.with_weights(rounded), work)
        skipped = {name: why for name, why in rest.skipped.items() if name not in rounded}
        return PassResult(rest.checkpoint, skipped, notes)

    def _walk(self, walk: Walk, checkpoint: Checkpoint, work: Workbench) -> dict[str, Weight]:
        def lost() -> NoReturn:
            walk.forget()
            raise MachineError(
                "a weight that an interrupted export had finished cannot be read; run it again"
            )

        ours = {name: w for name, w in checkpoint.weights.items() if self._is_ours(name, checkpoint)}
        rounded: dict[str, Weight] = {
            name: work.keeper.keep(name, lost) for name in walk.finished if name in ours
        }
        for block in walk:
            rounded |= self._keep(block, ours, work.keeper)
        return rounded

    def _keep(self, block: Block, ours: Mapping[str, Weight], keeper: Keeper) -> dict[str, Weight]:
        """Return the rounded matrices of a block, and leave it with those: as a resumed export will have them."""
        made = cache(lambda: self.round_block(block, ours))
        kept = {
            name: keeper.keep(name, partial(lambda name: made()[name], name))
            for name in block.linears
            if name in ours
        }
        for name, weight in kept.items():
            block.replace(name, weight)
        return kept

    def round_block(self, block: Block, ours: Mapping[str, Weight]) -> dict[str, Weight]:
        """Return the matrices of a block on the grid, each of them in its place in the block."""
        how = Compensation(self.damping, self.rounds, self.act_order)
        made: dict[str, Weight] = {}
        for stage in block.stages:
            gram = cache(partial(block.gram, stage[0]))
            for name in stage:
                if name not in ours:
                    continue
                bits = self.bits_of(name, "linear")
                group = self.group_of(name) if bits == 4 else ours[name].shape[1]
                made[name] = round_matrix(ours[name].float32(), gram(), bits, group, how)
                block.replace(name, made[name])
        return made

    def _is_ours(self, name: str, checkpoint: Checkpoint) -> bool:
        """Whether a matrix is one that this pass rounds if it lies in a block; all others are left to the base."""
        weight = checkpoint.weights[name]
        if not isinstance(weight, Dense) or checkpoint.roles[name] != "linear":
            return False
        bits = self.bits_of(name, "linear")
        return bits == 8 or (bits == 4 and not weight.shape[1] % GROUPS[0])
