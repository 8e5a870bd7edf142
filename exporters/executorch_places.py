"""Places for low-rank matrices in an ExecuTorch program: a second method, whose inputs they are.

    forward           tokens, start position                        as the stock runners call it; adds nothing
    forward_adapted   the same, and for every place A and B         y = W x + B (A x)

Both methods have the same constants, which the file holds once. A is float32 (1, in, rank) and B float32
(1, rank, out), transposed, with the adapter's scale in B. The rank is the program's: a smaller one is filled up with
zeros, as is a place that an adapter leaves alone. XNNPACK takes products of two inputs, so no partition is cut.

An adapter is a safetensors file of just those inputs, in the order of their names, so that an app can map it and hand
it over:

    NAME.lora_A, NAME.lora_B    for every place
    metadata                    version, and the SHA-256 of the program that it is for

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. The order is an entry of named data in
the program, as the names of weights are (`executorch_names`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slm_export.bundles.checksums import sha256_file
from slm_export.errors import InputError
from slm_export.foreign import reading
from slm_export.runtime import Factors

if TYPE_CHECKING:
    from torch.export import ExportedProgram

METHOD = "forward_adapted"
ENTRY = "slm_export.places"
A, B = ".lora_A", ".lora_B"
VERSION = "1"
"""Of what is written here: names, shapes and orientation of the matrices."""


@dataclass(frozen=True)
class Places:
    """What a program has places for."""

    rank: int
    shapes: Mapping[str, tuple[int, int]]
    """Weight -> (out, in)."""

    @property
    def inputs(self) -> dict[str, tuple[int, int, int]]:
        """Inputs by name, with their shapes, in their order: that in which safetensors lays them down."""
        found = {}
        for weight, (rows, columns) in self.shapes.items():
            place = weight.removesuffix(".weight")
            found[place + A] = (1, columns, self.rank)
            found[place + B] = (1, self.rank, rows)
        return dict(sorted(found.items()))

    def entry(self) -> bytes:
        """Return what the program says of them."""
        return json.dumps({"rank": self.rank, "shapes": self.shapes}).encode()

    @staticmethod
    def parsed(entry: bytes) -> Places:
        """Return what an entry says."""
        said = json.loads(entry)
        return Places(int(said["rank"]), {name: (int(o), int(i)) for name, (o, i) in said["shapes"].items()})


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


def write_adapter(factors: Mapping[str, Factors], base: Path, path: Path) -> None:
    """Write an adapter for the program at ``base`` alone.

    Raises:
        InputError: it has no place for a factor, or none of that rank.
    """
    from safetensors.torch import save_file

    places = places_of(base)
    if missing := [name for name in factors if name not in places.shapes]:
        raise InputError(
            f"{base}: has no place for an adapter at {missing[0]}; export it again with that adapter"
        )
    rank = max(int(each.down.shape[0]) for each in factors.values())
    if rank > places.rank:
        raise InputError(
            f"{base}: has places of rank {places.rank}, and the adapter is of rank {rank}; export it again with that "
            "adapter"
        )
    tensors = {name: torch.zeros(shape) for name, shape in places.inputs.items()}
    for name, each in factors.items():
        place, own = name.removesuffix(".weight"), each.down.shape[0]
        tensors[place + A][0, :, :own] = each.down.t()
        tensors[place + B][0, :own] = each.up.t()
    save_file(tensors, path, {"version": VERSION, "base_sha256": sha256_file(base)})


def read_adapter(path: Path, base: Path, places: Places) -> list[Tensor]:
    """Return the inputs that an adapter gives, in the order of the program.

    Raises:
        InputError: it is no adapter file, is one for another program, or does not fit.
    """
    tensors = _tensors(path, base)
    wanted = places.inputs
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != wanted or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        odd = min(name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name))
        raise InputError(f"{path}: {odd} does not fit the places of {base}; add the adapter again")
    return [tensors[name] for name in wanted]


def read_factors(path: Path, base: Path) -> dict[str, Factors]:
    """Return what an adapter file adds to each weight, read back from the file alone; what adds nothing is left out.

    Raises:
        InputError: it is no adapter file, or one for another program.
    """
    tensors = _tensors(path, base)
    found = {}
    for name, down in tensors.items():
        up = tensors.get(name.removesuffix(A) + B)
        if name.endswith(A) and up is not None and (bool(down.any()) or bool(up.any())):
            found[f"{name.removesuffix(A)}.weight"] = Factors(down[0].t(), up[0].t())
    return found


def _tensors(path: Path, base: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no adapter that can be read: {error}; add it again") from error
    if said.get("version") != VERSION:
        raise InputError(
            f"{path}: adapter version {said.get('version')}, and this slm-export reads {VERSION}; add it again"
        )
    if said.get("base_sha256") != sha256_file(base):
        raise InputError(
            f"{path}: was made for another model than {base}; add the adapter to this one with `slm-export adapter add`"
        )
    return tensors


def places_of(base: Path) -> Places:
    """Return what a program has places for; none where it was written without.

    Raises:
        InputError: the file is no program.
    """
    from slm_export.exporters.executorch_reader import named_entry

    with reading(base, "its places for adapters cannot be read"):
        entry = named_entry(base, ENTRY)
        return Places(0, {}) if entry is None else Places.parsed(entry)
