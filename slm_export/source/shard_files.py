"""Which safetensors files make up a model folder, and what their headers promise; no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from slm_export.errors import InputError
from slm_export.jsonfile import read_object

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHERS = {"*.gguf": "GGUF", "*.h5": "Keras", "*.msgpack": "Flax", "*.onnx": "ONNX"}
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name; empty without an index (or where one whole file makes it void)."""
    if not path.is_file() or path.with_name(_SINGLE).is_file():
        return {}
    try:
        mapping = read_object(path)["weight_map"]
        if not all(map(_is_a_name, mapping.values())):
            raise TypeError("weight_map must name .safetensors files of this folder")
    except (InputError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: not a readable index of shards ({reason}); download it again") from None
    return dict(mapping)


def _is_a_name(file: object) -> bool:
    """Return whether this names a file of the folder itself: no other place, on any system."""
    return isinstance(file, str) and re.fullmatch(r"[^/\\:\0]+\.safetensors", file) is not None


def shard_files(folder: Path, index: dict[str, str]) -> list[Path]:
    """Return the files of a folder, in the order that they are read.

    Given   index: what `read_index` returned of it

    Raises:
        InputError: there are no safetensors, or one is missing.
    """
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
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
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


def _few(names: Iterable[str], show: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - show} more" if len(listed) > show else ""
    return ", ".join(listed[:show]) + more
