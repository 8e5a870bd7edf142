"""How a sentence-embedding model makes one vector of its tokens' vectors (sentence-transformers' layout).

``modules.json`` lists the steps after the transformer: a pooling, perhaps a normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from slm_export.bundles.checksums import portable_path
from slm_export.errors import InputError
from slm_export.jsonfile import read_json

_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class Pooling:
    """mean over the tokens of the mask, the first token, or the largest of each dimension."""

    mode: Literal["mean", "cls", "max"] = "mean"
    normalize: bool = True
    stated: bool = True
    """False: the folder says nothing, and the usual (mean, normalised) was assumed."""

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, width) of hidden (batch, tokens, width) and mask (batch, tokens), 1 for a token."""
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif self.mode == "max":
            pooled = (hidden + (1 - weights) * -1e9).amax(dim=1)
        else:
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-9)
        if self.normalize:
            pooled = pooled / pooled.square().sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()
        return pooled


def read_pooling(folder: Path) -> Pooling:
    """Read ``modules.json`` and the pooling it names.

    Raises:
        InputError: a module or a mode that cannot be exported; nothing of it may be left out silently.
    """
    listing = folder / "modules.json"
    if not listing.is_file():
        return Pooling(stated=False)
    modules = read_json(listing)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InputError(f"{listing}: expected a list of modules")
    mode: Any = None
    normalize = False
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            mode = _mode(_inside(folder, module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise InputError(f"{listing}: module {kind} cannot be exported; Pooling and Normalize can")
    return Pooling("mean" if mode is None else mode, normalize, stated=mode is not None)


def _inside(folder: Path, name: object) -> Path:
    """Return the folder of a module; InputError where it is not one of the model's own."""
    try:
        return folder / portable_path(str(name)) if name else folder
    except ValueError as error:
        raise InputError(f"{folder / 'modules.json'}: {error}") from None


def _mode(path: Path) -> str:
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    stated = config.get("pooling_mode")
    chosen = (
        [stated]
        if isinstance(stated, str)
        else [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    )
    names = [_MODES.get(key, key) for key in chosen]
    if len(names) != 1 or names[0] not in _MODES.values():
        known = ", ".join(_MODES.values())
        raise InputError(
            f"{path}: pooling {' + '.join(names) or 'of no kind'} cannot be exported; known: {known}"
        )
    return names[0]


def additive_mask(mask: Tensor) -> Tensor:
    """Return float32 (batch, 1, 1, tokens), 0 where ``mask`` (batch, tokens) is 1, and very small elsewhere."""
    return ((1 - mask.to(torch.float32)) * -1e9)[:, None, None, :]
