"""Places for adapters in an ExecuTorch program: a second method, whose inputs their matrices are.

    forward           tokens, start position                        as the stock runners call it; adds nothing
    forward_adapted   the same, and for every place A and B (`adapter_matrices`)

Both methods have the same constants, which the file holds once. XNNPACK takes products of two inputs, so no partition
is cut. What the inputs are is an entry of named data in the program, as the names of weights are (`executorch_names`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slm_export.errors import InputError
from slm_export.exporters.adapter_matrices import A, B, Places
from slm_export.foreign import reading

if TYPE_CHECKING:
    from torch.export import ExportedProgram

METHOD = "forward_adapted"
ENTRY = "slm_export.places"


@dataclass
class Matrices:
    """What the places of a module share while one call is traced."""

    given: dict[str, Tensor] = field(default_factory=dict)
    """By the names of inputs; nothing while no adapter is on."""


class Place(nn.Module):
    """A linear layer, and what an adapter adds to it."""

    def __init__(self, part: nn.Module, weight: str, matrices: Matrices) -> None:
        super().__init__()
        self.part, self.name, self.matrices = part, weight.removesuffix(".weight"), matrices

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 (1, tokens, out) of float32 (1, tokens, in)."""
        y: Tensor = self.part(x)
        given = self.matrices.given
        if not given:
            return y
        if x.dim() != 3:
            raise InputError(f"{self.name} is given {x.dim()} dimensions, and a place for an adapter takes 3")
        return y + torch.bmm(torch.bmm(x, given[self.name + A]), given[self.name + B])


class _Adapted(nn.Module):
    def __init__(self, decoder: nn.Module, matrices: Matrices, names: Sequence[str]) -> None:
        super().__init__()
        self.decoder, self._matrices, self._names = decoder, matrices, tuple(names)

    def forward(self, tokens: Tensor, input_pos: Tensor, given: list[Tensor]) -> Tensor:
        self._matrices.given = dict(zip(self._names, given, strict=True))
        try:
            logits: Tensor = self.decoder(tokens, input_pos)
        finally:
            self._matrices.given = {}
        return logits


def trace_adapted(decoder: nn.Module, matrices: Matrices, places: Places, longest: int) -> ExportedProgram:
    """Return torch.export's graph of a decoder with places, as the second method has it."""
    from torch.export import Dim, export

    shapes = places.inputs
    given = [torch.zeros(shape) for shape in shapes.values()]
    example = (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), given)
    tokens = Dim("tokens", min=1, max=longest)
    dynamic = ({1: tokens}, None, [None] * len(given))
    with torch.no_grad():
        return export(
            _Adapted(decoder, matrices, list(shapes)), example, dynamic_shapes=dynamic, strict=False
        )


def places_of(base: Path) -> Places:
    """Return what a program has places for; none where it was written without.

    Raises:
        InputError: the file is no program.
    """
    from slm_export.exporters.executorch_reader import named_entry

    with reading(base, "its places for adapters cannot be read"):
        entry = named_entry(base, ENTRY)
        return Places(0, {}) if entry is None else Places.parsed(entry)
