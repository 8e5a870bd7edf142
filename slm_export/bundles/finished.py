"""Weights that a pass has finished, on disk: memory stays small, and an interrupted export goes on where it stopped.

A finished weight is a file in the cache folder, mapped when it is used. It lies under a hash of all that it follows
from: the source model, the passes up to this one with their options, this program's version; so what is found there
is what would be computed again. An export that ends, well or not, removes its files; a killed or interrupted one
leaves them to the next, and files that nobody came back for are removed after a week. Where $SLM_EXPORT_KEEP is set
an export is one of many: it leaves its files to the others, and whoever started them removes the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slm_export import __version__
from slm_export.bundles.held import Held, reclaim
from slm_export.errors import GateError
from slm_export.weights import CODE_RANGE, Dense, Palettized, Quantized, Weight

CACHE_VARIABLE = "SLM_EXPORT_CACHE"
KEEP_VARIABLE = "SLM_EXPORT_KEEP"
_FORGOTTEN_S = 7 * 24 * 3600.0

Kept = TypeVar("Kept", bound=Weight)


class Keeper(Protocol):
    """Keeps the weights that a pass makes, one by one."""

    def keep(self, name: str, make: Callable[[], Kept]) -> Kept:
        """Return the weight ``name``: kept from an earlier run, or made now."""


class InMemory:
    """Keeps nothing but the weights themselves."""

    def keep(self, name: str, make: Callable[[], Kept]) -> Kept:
        """Make it."""
        return make()


IN_MEMORY = InMemory()


@dataclass
class Finished:
    """The finished weights of one pass of one export."""

    folder: Path
    reused: list[str] = field(default_factory=list)
    """Names of the weights that an earlier run had finished."""
    held: Held | None = None
    """While an export uses the folder; another one of the same model may use it too."""

    def keep(self, name: str, make: Callable[[], Kept]) -> Kept:
        """Return the weight from its file; made and written first, if it is not there."""
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"
        found = _read(path)
        if found is not None:
            self.reused.append(name)
            return found  # type: ignore[return-value]  # what was made by the same call of another run
        made = make()
        _write(path, made)
        # Somebody may empty the cache at any moment; then the weight stays in memory.
        return _read(path) or made  # type: ignore[return-value]


def cache_folder() -> Path:
    """Return where finished weights are: $SLM_EXPORT_CACHE, or slm-export in the user's cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "slm-export"


def finished_weights(follows_from: Sequence[object]) -> Finished:
    """Return the place for weights that follow from these JSON values; an OSError where it cannot be made."""
    key = hashlib.sha256(json.dumps([__version__, *follows_from]).encode()).hexdigest()
    root = cache_folder() / "finished"
    remove_forgotten(root)
    held = Held(root / key[:32])
    os.utime(held.folder)
    return Finished(held.folder, held=held)


@contextmanager
def until_the_end() -> Iterator[list[Finished]]:
    """Remove what the list then holds when the export ends, by success or by a verdict; weights stay readable.

    What another export uses is left to that.
    """
    kept: list[Finished] = []
    try:
        yield kept
    except BaseException as error:
        _leave(kept, remove=isinstance(error, GateError))
        raise
    _leave(kept, remove=True)


def _leave(kept: Sequence[Finished], *, remove: bool) -> None:
    for finished in kept:
        if finished.held is not None:
            finished.held.leave(remove=remove and not os.environ.get(KEEP_VARIABLE))


def remove_forgotten(root: Path) -> None:
    """Remove the folders in ``root`` that nobody came back for in a week, and nobody holds."""
    for folder in root.glob("*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _FORGOTTEN_S:
                reclaim(folder)


def _write(path: Path, weight: Weight) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    if isinstance(weight, Dense):
        tensors, bits = {"values": weight.load().contiguous()}, 0
    elif isinstance(weight, Palettized):
        packed, tables = weight.load()
        tensors, bits = {"packed": packed.contiguous(), "tables": tables.contiguous()}, weight.bits
    else:
        packed, scales = weight.load()
        # Scales are bfloat16 values, so nothing is lost.
        tensors, bits = {"packed": packed.contiguous(), "scales": scales.to(torch.bfloat16)}, weight.bits
    try:
        save_file(tensors, part, {"bits": str(bits)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> Weight | None:
    """Return the weight of a file; None where there is none, or one that was cut short by a dying machine."""
    try:
        load = _Load(path)
        with safe_open(load.path, framework="pt") as file:
            bits = int((file.metadata() or {})["bits"])
            if not bits:
                values = file.get_tensor("values")
                return Dense(tuple(values.shape), values.dtype, lambda: load()["values"])
            rows, width = file.get_slice("packed").get_shape()
            columns = width * 8 // bits
            if "tables" in file.keys():  # noqa: SIM118 - not a mapping
                tables = file.get_slice("tables").get_shape()[0]
                return Palettized((rows, columns), bits, rows // tables, lambda: _indices_and_tables(load()))
            groups = file.get_slice("scales").get_shape()[1]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if bits not in CODE_RANGE or columns % groups:
        return None
    return Quantized((rows, columns), bits, columns // groups, lambda: _codes_and_scales(load()))


def _codes_and_scales(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors["packed"], tensors["scales"].to(torch.float32)


def _indices_and_tables(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors["packed"], tensors["tables"]


class _Load:
    """Maps the tensors of one file, which stays open: removing it takes nothing away."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        self.path = f"/dev/fd/{descriptor}"

    def __call__(self) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
