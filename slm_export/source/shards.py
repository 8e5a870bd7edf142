"""The safetensors files of a model folder: found, checked, and read one tensor at a time.

A tensor is mapped from its file when it is asked for and let go with its last reference, so the weights
of a model never stand in memory together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slm_export.errors import InputError
from slm_export.weights import Dense

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHERS = {"*.gguf": "GGUF", "*.h5": "Keras", "*.msgpack": "Flax", "*.onnx": "ONNX"}
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_shards(folder: Path) -> tuple[dict[str, Dense], dict[str, str]]:
    """Return the float tensors of a folder by name, and what is not a float: name -> reason.

    Raises:
        InputError: there are no safetensors, or one is missing, truncated or corrupt, or lacks what the
            index promises.
    """
    index = _read_index(folder / INDEX)
    shards = _shards(folder, index)
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


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name; empty without an index (or where one whole file makes it void)."""
    if not path.is_file() or path.with_name(_SINGLE).is_file():
        return {}
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and "/" not in file for file in mapping.values()):
            raise TypeError("weight_map must name files of this folder")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: not a readable index of shards ({error}); download it again") from None
    return dict(mapping)


def _shards(folder: Path, index: dict[str, str]) -> list[Path]:
    if index:
        files = [folder / name for name in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(
                f"{folder}: missing {_few(missing)} of {len(files)} shards that {INDEX} lists; "
                "download the model again"
            )
        return files
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(_why_none(folder))
    _refuse_gaps(folder, files)
    return files


def _refuse_gaps(folder: Path, files: list[Path]) -> None:
    """Without an index, only the numbers in the names tell whether a shard is missing."""
    matches = [_NUMBERED.fullmatch(file.name) for file in files]
    if len(files) > 1 and not all(matches):
        names = _few([file.name for file in files])
        raise InputError(
            f"{folder}: several weight files and no {INDEX}: {names}; keep one model in a folder"
        )
    for match in matches:
        if match and len(files) != int(match[3]):
            raise InputError(
                f"{folder}: {len(files)} shards where {match[0]} says there are {int(match[3])}; "
                "download the model again"
            )


def _why_none(folder: Path) -> str:
    if pickles := [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]:
        return (
            f"{folder}: the weights are pickle files ({_few(pickles)}), which can run any code when opened "
            "and are never opened here; convert them in a place you trust: AutoModel"
            ".from_pretrained(FOLDER).save_pretrained(NEW) with transformers writes safetensors"
        )
    for pattern, kind in _OTHERS.items():
        if found := sorted(folder.glob(pattern)):
            return (
                f"{folder}: {found[0].name} is a {kind} file; give the Hugging Face folder it was made from"
            )
    return f"{folder}: no weights; expected {_SINGLE}, or shards and {INDEX}"


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
        size = path.stat().st_size
        raise InputError(
            f"{path}: truncated or corrupt ({error}; {size:,} bytes); download the model again"
        ) from None
    return found


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


def _few(names: Iterable[str], show: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - show} more" if len(listed) > show else ""
    return ", ".join(listed[:show]) + more
