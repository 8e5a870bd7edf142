"""Adapters as input: a folder that peft saved is merged into the base that it names, and the result is a model folder.

    adapter_config.json, adapter_model.safetensors   ->   <cache>/merged/<hash>/<name of the adapter's folder>/

The hash is over the adapter, the base and the tools, so that the next export, `plan` and `verify` find what was made;
what nobody asked for in a week is removed. peft merges (Hu et al., "LoRA", 2021, and its kin), in the base's own
type; that every tensor of the adapter took its place is checked here, because peft only warns.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from slm_export import __version__
from slm_export.bundles.checksums import sha256_file
from slm_export.errors import InputError
from slm_export.jsonfile import read_object
from slm_export.machine import machine_errors
from slm_export.source.adapter_files import (
    CONFIG,
    adapter_sha256,
    peft_config,
    read_tensors,
    refuse_another_task,
    refuse_lost,
    rejected,
)

MERGED = "merged_adapter.json"
"""In a merged folder: what it was made of."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of an adapter that stays apart: it becomes a file's."""
_SHARD = "2GB"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


class MergedFrom(BaseModel):
    """What a merged model was made of, for manifest and report."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    adapter: str
    adapter_sha256: str
    kind: str
    """LORA, ..."""
    rank: int | None


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, and no model of its own.

    Raises:
        InputError: it holds both, and which of them is meant cannot be told.
    """
    if not (folder / CONFIG).is_file():
        return False
    if (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: holds a model (config.json) and an adapter ({CONFIG}); give a folder that holds one of them"
        )
    return True


def parse_adapters(asked: Collection[str]) -> tuple[tuple[str, Path], ...]:
    """Return names and folders of ``NAME=FOLDER``; of a folder alone its own name is taken.

    Raises:
        InputError: a name that no file may have, one that is there twice, or no adapter's folder.
    """
    found: dict[str, Path] = {}
    for text in asked:
        name, given, place = text.rpartition("=")
        folder = Path(os.path.expanduser(place))
        name = name if given else folder.resolve().name
        if name in found:
            raise InputError(f"adapter '{name}' is there twice; give one another name: NAME=FOLDER")
        check_adapter(name, folder)
        found[name] = folder
    return tuple(found.items())


def check_adapter(name: str, folder: Path) -> None:
    """Raise InputError for a name that no file may have, or where there is no adapter."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"adapter '{name}': cannot be a name; letters, digits, '.', '_' and '-' can: NAME=FOLDER"
        )
    if not folder.is_dir() or not is_adapter(folder):
        raise InputError(f"adapter '{name}': {folder} is no folder that peft saved (with {CONFIG} in it)")


def base_of(folder: Path, find: Callable[[str, str | None], Path]) -> Path:
    """Return the folder of the model that an adapter belongs to, which ``find`` finds by name and revision.

    A relative path is one from the current folder, or else from the adapter's.
    """
    config = read_object(folder / CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{folder / CONFIG}: base_model_name_or_path is missing; write the base's folder or name there"
        )
    beside = folder / name
    if not os.path.isdir(os.path.expanduser(name)) and beside.is_dir():
        name = str(beside)
    try:
        found = find(name, revision if isinstance(revision, str) and not os.path.isdir(name) else None)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: base_model_name_or_path: {error}") from error
    if (found / CONFIG).is_file():
        raise InputError(f"{folder / CONFIG}: its base {name} is an adapter too; merge that one first")
    return found


def merged(folder: Path, base: Path) -> Path:
    """Return the folder of the model that an adapter and its base make; made if it is not there.

    Raises:
        InputError: the adapter cannot be merged, or does not belong to that base.
        MachineError: the disk is full, or memory is.
        MissingComponentError: peft is not installed.
    """
    # Not at the top: `plan` reads names alone, and waits for no torch.
    from slm_export.bundles.finished import cache_folder, remove_forgotten

    sha256 = adapter_sha256(folder)
    config = peft_config(folder)
    root = cache_folder() / "merged"
    with machine_errors("merge the adapter", root):
        place = root / _key(sha256, folder, base)
        made = place / folder.resolve().name
        if not made.is_dir():
            remove_forgotten(root)
            facts = MergedFrom(
                base=base.resolve().name,
                adapter=folder.resolve().name,
                adapter_sha256=sha256,
                kind=str(config.peft_type.value),
                rank=getattr(config, "r", None),
            )
            _make(folder, base, config, facts, made)
        os.utime(place)
    return made


def merged_from(folder: Path) -> MergedFrom | None:
    """Return what the model of a folder was merged from; None where it is no merged one.

    Raises:
        InputError: the file is there and is not one of slm-export.
    """
    path = folder / MERGED
    if not path.is_file():
        return None
    try:
        return MergedFrom.model_validate(read_object(path))
    except ValidationError as error:
        raise InputError(f"{path}: {error.errors()[0]['msg']}") from error


def _key(adapter: str, folder: Path, base: Path) -> str:
    """Return a name for what comes out; of the base, whose bytes are many, sizes and times stand for the content."""
    own = [[f.name, sha256_file(f)] for f in _beside(folder)]
    stats = [
        [str(file.relative_to(base)), file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(base.rglob("*"))
        if file.is_file()
    ]
    tools = [__version__, version("peft"), version("transformers"), version("torch")]
    return hashlib.sha256(json.dumps([tools, adapter, own, str(base.resolve()), stats]).encode()).hexdigest()[
        :32
    ]


def _make(folder: Path, base: Path, config: Any, facts: MergedFrom, made: Path) -> None:
    partial = made.parent / f".{secrets.token_hex(4)}.partial"
    partial.mkdir(parents=True)
    try:
        _merge(folder, base, config, partial)
        for file in [*_beside(base), *_beside(folder)]:
            if file.name not in ("config.json", CONFIG):
                shutil.copyfile(file, partial / file.name)
        for part in base.glob("*_Pooling"):
            shutil.copytree(part, partial / part.name)
        (partial / MERGED).write_text(facts.model_dump_json(indent=2), encoding="utf-8")
        if not made.is_dir():  # somebody else may have been faster
            os.rename(partial, made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(folder: Path) -> list[Path]:
    """Return the files of a folder that are no weights: tokenizer, licence, card."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix not in _NOT_COPIED
        and not file.name.endswith((".safetensors.index.json", ".bin.index.json"))
    ]


def _merge(folder: Path, base: Path, config: Any, out: Path) -> None:
    import peft
    import torch

    from slm_export.source.architecture import read_architecture

    architecture = read_architecture(base)
    refuse_another_task(folder, config, architecture.name)
    tensors = read_tensors(folder)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = architecture.cls.from_pretrained(
            base, config=architecture.config, dtype="auto", local_files_only=True, use_safetensors=True
        )
        _resize(module, tensors)
        with rejected(f"{folder}: does not belong to {base}"):
            adapted = peft.PeftModel.from_pretrained(module, str(folder), config=config)
        # A whole embedding is there if whoever saved the adapter thought that it may have grown, or not.
        wanted, possible = (
            peft.get_peft_model_state_dict(adapted, save_embedding_layers=whole) for whole in (False, True)
        )
        refuse_lost(folder, base, tensors.keys() - possible.keys(), wanted.keys() - tensors.keys())
        with rejected(f"{folder}: cannot be merged"):
            whole = adapted.merge_and_unload(safe_merge=True)
        whole.save_pretrained(out, max_shard_size=_SHARD)


def _resize(module: Any, tensors: Mapping[str, Any]) -> None:
    """Give the base as many tokens as the adapter, where that brings an embedding of its own."""
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")):
            if tensor.shape[0] != module.get_input_embeddings().weight.shape[0]:
                module.resize_token_embeddings(tensor.shape[0])
            return
