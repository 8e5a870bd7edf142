"""The safetensors files of a model folder: found, checked, and read one tensor at a time.

A tensor is mapped from its file when it is asked for and let go with its last reference, so the weights
of a model never stand in memory together.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slm_export.errors import InputError
from slm_export.source.shard_files import INDEX, read_index, shard_files
from slm_export.weights import Dense

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_shards(folder: Path) -> tuple[dict[str, Dense], dict[str, str]]:
    """Return the float tensors of a folder by name, and what is not a float: name -> reason.

    Raises:
        InputError: there are no safetensors, or one is missing, truncated or corrupt, or lacks what the
            index promises.
    """
    index = read_index(folder / INDEX)
    shards = shard_files(folder, index)
    tensors: dict[str, Dense] = {}
    left: dict[str, str] = {}
    for shard in shards:
        for name, tensor in _read_header(shard).items():
            if name in tensors or name in left:
                raise InputError(f"{shard}: tensor {name} is in another shard too; remove one of the files")
            if isinstance(tensor, Dense):
                tensors[name] = tensor
            else:
                left[name] = tensor
    if missing := [name for name in index if name not in tensors and name not in left]:
        raise InputError(
            f"{folder / index[missing[0]]}: tensor {missing[0]} is promised by {INDEX}, but not there "
            f"({len(missing)} missing in all); download the model again"
        )
    return tensors, left


def first_bad_value(tensor: Tensor) -> str | None:
    """Return "NaN" or "infinity" if a value is not finite, else None."""
    if not tensor.numel():
        return None
    low, high = (float(value) for value in torch.aminmax(tensor))
    if low != low or high != high:
        return "NaN"
    return "infinity" if float("inf") in (high, -low) else None


def _read_header(path: Path) -> dict[str, Dense | str]:
    """Return what a shard holds, from its header alone; a tensor that is no float is a reason."""
    found: dict[str, Dense | str] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                dtype = part.get_dtype()
                if dtype in _FLOATS:
                    found[name] = Dense(tuple(part.get_shape()), _FLOATS[dtype], _Load(path, name))
                else:
                    found[name] = f"{dtype} values, not floats"
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: truncated or corrupt ({error}; {_size(path)}); download the model again"
        ) from None
    return found


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size:,} bytes"
    except OSError as error:
        return str(error.strerror)


class _Load:
    """Maps one tensor of one file."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name

    def __call__(self) -> Tensor:
        try:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self._name)
                return tensor
        except SafetensorError as error:
            raise InputError(f"{self._path}: changed while it was read: {error}") from None
