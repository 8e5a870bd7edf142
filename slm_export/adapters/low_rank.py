"""A folder that peft saved -> what it adds to each matrix of its base, as two thin factors.

peft reads the folder (names, ranks by layer, scales, rank-stabilised or not), on a module without weights. Beside the
factors, which artifacts get, stands what peft itself makes of them: that is what artifacts are held against.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.runtime import Factors
from slm_export.source.adapter_files import (
    adapter_sha256,
    peft_config,
    read_tensors,
    refuse_another_task,
    refuse_lost,
    rejected,
)
from slm_export.source.load import architecture_of
from slm_export.source.provenance import source_sha256

_MORE_THAN_FACTORS = {
    "use_dora": "it has magnitudes of its own (DoRA)",
    "modules_to_save": "it has whole modules of its own (modules_to_save)",
    "trainable_token_indices": "it has tokens of its own (trainable_token_indices)",
    "target_parameters": "it adapts parameters that are no layers (target_parameters)",
    "alora_invocation_tokens": "it turns itself on within a text (activated LoRA)",
    "layer_replication": "it repeats layers (layer_replication)",
    "lora_bias": "its matrices have biases (lora_bias)",
    "use_qalora": "its first factor is pooled (QA-LoRA)",
    "use_bdlora": "its factors are in blocks (BD-LoRA)",
}
"""Options of peft that need more than two factors at run time -> what that is."""
_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Beginnings of an adapter that do not take something from the base's own matrices, as PiSSA and its like do."""


@dataclass(frozen=True)
class LowRank:
    """An adapter: factors by the name of the weight that they add to."""

    name: str
    sha256: str
    """Of configuration and weights of the folder."""
    factors: Mapping[str, Factors]
    deltas: Mapping[str, Callable[[], Tensor]]
    """Weight -> what peft adds to it, float32 (out, in)."""

    @property
    def rank(self) -> int:
        """The largest."""
        return max(int(each.down.shape[0]) for each in self.factors.values())

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(each.down.numel() + each.up.numel() for each in self.factors.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """Layers that it adds to, by the last part of their names: k_proj, q_proj."""
        return tuple(sorted({name.split(".")[-2] for name in self.factors}))


def read_low_rank(name: str, folder: Path, base: Checkpoint, sha256: str) -> LowRank:
    """Read an adapter of a model.

    Given   base: the model as it came, before any pass; no matrix of it is read
            sha256: the hash of that model's files, as the manifest has it

    Raises:
        InputError: it needs more than two factors at run time, belongs to another model, or was never trained.
        MissingComponentError: peft is not installed.
    """
    config = peft_config(folder)
    _refuse_more_than_factors(folder, config)
    refuse_another_task(folder, config, base.architecture)
    _refuse_another_base(folder, config, base, sha256)
    layers = _layers(folder, config, base)
    factors, deltas = {}, {}
    for weight, layer in layers.items():
        factors[weight] = _factors(folder, weight, layer, base)
        deltas[weight] = _delta(layer, weight in base.transposed)
    if not any(bool(each.up.any()) and bool(each.down.any()) for each in factors.values()):
        raise InputError(f"{folder}: adds nothing: all of its second factors are 0, as before any training")
    return LowRank(name, adapter_sha256(folder), factors, deltas)


def _refuse_more_than_factors(folder: Path, config: Any) -> None:
    kind = config.peft_type.value
    if kind != "LORA":
        raise InputError(f"{folder}: {kind} cannot be kept apart, LORA alone can; merge it: give it as MODEL")
    for option, what in _MORE_THAN_FACTORS.items():
        if getattr(config, option, None):
            raise InputError(f"{folder}: {what}, and cannot be kept apart; merge it: give it as MODEL")
    if config.init_lora_weights not in _LEAVE_THE_BASE:
        raise InputError(
            f"{folder}: it began by changing the base's own matrices (init_lora_weights: {config.init_lora_weights}), "
            "and cannot be kept apart; merge it: give it as MODEL"
        )
    if config.bias != "none":
        raise InputError(
            f"{folder}: it has biases of its own (bias), and cannot be kept apart; give it as MODEL"
        )


def _refuse_another_base(folder: Path, config: Any, base: Checkpoint, sha256: str) -> None:
    """Refuse an adapter that names a folder with another model; names on a hub say nothing of the files here."""
    named = str(config.base_model_name_or_path or "")
    for place in (Path(os.path.expanduser(named)), folder / named):
        if named and os.path.isfile(place / "config.json"):
            if place.resolve() != base.folder.resolve() and source_sha256(place) != sha256:
                raise InputError(
                    f"{folder}: was trained on {named}, whose files are not those of {base.folder} (another sha256); "
                    "export the model that it was trained on"
                )
            return


def _layers(folder: Path, config: Any, base: Checkpoint) -> dict[str, Any]:
    """Return weight -> peft's layer, with the adapter's tensors in it and without the base's."""
    import peft
    from peft.tuners.lora import Linear, LoraLayer

    tensors = read_tensors(folder)
    module = architecture_of(base).empty_module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rejected(f"{folder}: does not belong to {base.folder}"):
            adapted = peft.PeftModel.from_pretrained(
                module, str(folder), config=config, low_cpu_mem_usage=True
            )
        wanted = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = {}
    inside: Any = adapted.base_model.model
    for path, layer in inside.named_modules():
        if isinstance(layer, LoraLayer):
            if type(layer) is not Linear or getattr(layer, "lora_variant", None):
                raise InputError(
                    f"{folder}: adapts {path}, a {type(layer).__name__}, which cannot be kept apart; give it as MODEL"
                )
            if base.roles.get(f"{path}.weight") != "linear":
                raise InputError(
                    f"{folder}: adapts {path}, and only linear layers within the model can have an adapter apart; "
                    "merge it (give it as MODEL), or train without that layer"
                )
            found[f"{path}.weight"] = layer
    refuse_lost(folder, base.folder, tensors.keys() - wanted.keys(), wanted.keys() - tensors.keys())
    # The base has no values, and peft puts an adapter where its base is: so its values are given to it again.
    # In float32, in which peft computes, whatever they were saved in.
    inner = {
        re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", key): value.to(torch.float32)
        for key, value in tensors.items()
    }
    adapted.load_state_dict(inner, strict=False, assign=True)
    return found


def _factors(folder: Path, weight: str, layer: Any, base: Checkpoint) -> Factors:
    down, up = (part["default"].weight.detach().to(torch.float32) for part in (layer.lora_A, layer.lora_B))
    rows, columns = base.weights[weight].shape
    if (up.shape[0], down.shape[1], up.shape[1]) != (rows, columns, down.shape[0]):
        raise InputError(
            f"{folder}: its factors {list(up.shape)} and {list(down.shape)} do not fit {weight} of {base.folder}, "
            f"which is {[rows, columns]}; it was trained on another model"
        )
    if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
        raise InputError(
            f"{folder}: the factors of {weight} hold values that are no numbers; its training diverged"
        )
    return Factors(down.clone(), up * float(layer.scaling["default"]))


def _delta(layer: Any, transposed: bool) -> Callable[[], Tensor]:
    def delta() -> Tensor:
        with torch.no_grad():
            made: Tensor = layer.get_delta_weight("default").to(torch.float32)
        return made.t() if transposed else made

    return delta
