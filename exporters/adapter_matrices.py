"""Adapters as files of the inputs that a function with places takes, for runtimes without a format of their own.

A function's places are two inputs beside every matrix that an adapter may add to, y = W x + B (A x):

    NAME.lora_A   float32 (1, in, rank)     A transposed, as a product of rows wants it
    NAME.lora_B   float32 (1, rank, out)    B transposed, the adapter's scale in it

The rank is the function's: a smaller one is filled up with zeros, as is a place that an adapter leaves alone. A file is
safetensors of just those inputs, in the order of their names, so that an app can map it and hand it over; its metadata
has a version, and the SHA-256 of the model that it is for.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slm_export.bundles.checksums import sha256_file
from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.runtime import Factors

A, B = ".lora_A", ".lora_B"
VERSION = "1"
"""Of what is written here: names, shapes and orientation of the matrices."""


@dataclass(frozen=True)
class Places:
    """What a program has places for."""

    rank: int
    shapes: Mapping[str, tuple[int, int]]
    """Weight -> (out, in)."""

    @staticmethod
    def of(checkpoint: Checkpoint, names: Collection[str], rank: int) -> Places:
        """Return places beside some matrices of a checkpoint."""
        matrices = {name: checkpoint.weights[name].shape for name in names}
        return Places(rank, {name: (shape[0], shape[1]) for name, shape in matrices.items()})

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


NO_PLACES = Places(0, {})


def write_adapter(factors: Mapping[str, Factors], places: Places, base: Path, path: Path) -> None:
    """Write an adapter for the model at ``base`` alone, which has these places.

    Raises:
        InputError: it has no place for a factor, or none of that rank.
    """
    from safetensors.torch import save_file

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
    save_file(tensors, path, {"version": VERSION, "base_sha256": _sha256(base)})


def read_adapter(path: Path, base: Path, places: Places) -> list[Tensor]:
    """Return the inputs that an adapter gives, in the order of the function.

    Raises:
        InputError: it is no adapter file, is one for another model, or does not fit.
    """
    tensors = _tensors(path, base)
    wanted = places.inputs
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != wanted or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        differing = [name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name)]
        odd = min(differing, default=next(iter(tensors)))
        raise InputError(f"{path}: {odd} does not fit the places of {base}; add the adapter again")
    return [tensors[name] for name in wanted]


def read_factors(path: Path, base: Path) -> dict[str, Factors]:
    """Return what an adapter file adds to each weight, read back from the file alone; what adds nothing is left out.

    Raises:
        InputError: it is no adapter file, or one for another model.
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
    if said.get("base_sha256") != _sha256(base):
        raise InputError(
            f"{path}: was made for another model than {base}; add the adapter to this one with `slm-export adapter add`"
        )
    return tensors


def _sha256(base: Path) -> str:
    """Return the hash of a model; switching must not take the time of reading all of it."""
    found = base.stat()
    return _hashed(base, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _hashed(base: Path, size: int, changed: int) -> str:
    return sha256_file(base)
