"""Quantize linear layers, and learn codes and scales so that each block gives what the source's block gives.

Given   Dense matrices of a model that is a sequence of blocks, and text
Result  as `gptq` has it, with the codes and scales of each block learned together

What `gptq` makes of a block is where learning begins. Then the mean squared error of the block's output is lessened by
Adam, through the rounding: inputs are what the quantized blocks before it make of the text, targets what the source
makes of it (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020; Li et al., "BRECQ:
Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021; Cheng et al., "Optimize Weight
Rounding via Signed Gradient Descent" (AutoRound), 2023). Batches that learning never sees choose the best state, the
first one among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slm_export.compression.blockwise import Batch, Block
from slm_export.compression.latent import Latent
from slm_export.errors import InputError
from slm_export.optimizers.gptq import Gptq
from slm_export.weights import Quantized, Weight

_MEASURED = 5
"""Times that a block is measured on batches that it does not learn from."""
_HELD_OUT = 8
"""Every eighth batch is one of those."""
_SEED = 5


@dataclass(frozen=True)
class LearnedRounding(Gptq):
    """Options: those of gptq, and how long and how fast each block learns."""

    name: ClassVar[str] = "learned-rounding"
    targets: ClassVar[bool] = True

    steps: int = 60
    """For each block, of one batch of text each."""
    code_rate: float = 0.002
    """Largest change of a number behind a code in one step, in units of its scale."""
    rate: float = 0.0002
    """The same of scales, as a share of their size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise InputError(f"{self.name}: steps must not be negative, not {self.steps}")
        if self.code_rate < 0 or self.rate < 0:
            raise InputError(f"{self.name}: code_rate and rate must not be negative")

    def round_block(self, block: Block, ours: Mapping[str, Weight]) -> dict[str, Weight]:
        """Return the matrices of a block on the grid, learned from what `gptq` makes of them."""
        made = super().round_block(block, ours)
        latents = {
            name: Latent(weight, ours[name].float32())
            for name, weight in made.items()
            if isinstance(weight, Quantized)
        }
        return made if not latents or not self.steps else self._learn(block, latents)

    def _learn(self, block: Block, latents: Mapping[str, Latent]) -> dict[str, Weight]:
        learning = [b for i, b in enumerate(block.batches) if i % _HELD_OUT != _HELD_OUT - 1]
        held_out = block.batches[_HELD_OUT - 1 :: _HELD_OUT] or block.batches
        optimizer = torch.optim.Adam(
            [
                {"params": [latent.codes for latent in latents.values()], "lr": self.code_rate},
                {"params": [latent.factors for latent in latents.values()], "lr": self.rate},
            ]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        kept, best = _weights(latents), _measure(block, latents, held_out)
        order = torch.randint(
            len(learning), (self.steps,), generator=torch.Generator().manual_seed(_SEED)
        ).tolist()
        for step, index in enumerate(order, 1):
            optimizer.zero_grad()
            _loss(block, latents, learning[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            for latent in latents.values():
                latent.clip()
            if step * _MEASURED // self.steps > (step - 1) * _MEASURED // self.steps:
                loss = _measure(block, latents, held_out)
                if loss < best:
                    kept, best = _weights(latents), loss
        return kept


def _loss(block: Block, latents: Mapping[str, Latent], batch: Batch) -> Tensor:
    """Return the mean squared error of the block's output, as a share of the targets' mean square."""
    assert block.targets is not None
    for name, latent in latents.items():
        block.linears[name].matrix = latent.matrix()
    target = block.targets.read(batch)
    return (block.run(batch) - target).square().mean() / target.square().mean()


@torch.no_grad()
def _measure(block: Block, latents: Mapping[str, Latent], batches: Sequence[Batch]) -> float:
    return sum(_loss(block, latents, batch).item() for batch in batches)


def _weights(latents: Mapping[str, Latent]) -> dict[str, Weight]:
    return {name: latent.weight() for name, latent in latents.items()}
