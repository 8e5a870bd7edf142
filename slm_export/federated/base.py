"""What a federation teaches: a frozen base, and the tensors on it that learn.

Opened once in a process, and used for every message. Tensors have the names that peft saves them by
(``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``); of a head, those of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from slm_export.errors import InputError
from slm_export.federated.settings import Model
from slm_export.federated.updates import Tensors
from slm_export.learning import models
from slm_export.learning.on_device.build import ADAPTER_FILE, on_grid, write_adapter
from slm_export.learning.on_device.step import Learns, learner, trainable
from slm_export.machine import machine_errors
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import refuse_large_vocabulary
from slm_export.source.tasks import CLASSIFICATION
from slm_export.tokenization.tokenizer import SourceTokenizer


@dataclass(frozen=True)
class Base:
    """A model of which little learns. Its module is changed in place by whoever trains it."""

    folder: Path
    task: str
    learns: Learns
    module: Any
    """transformers' module, in peft's for an adapter; float32, evaluation mode."""
    tokenizer: SourceTokenizer
    labels: tuple[str, ...]
    """Names of the classes by number; none of a model that writes text."""
    positions: int | None
    """The most tokens of one text; None: without bound."""
    begun: Tensors
    """What learns, before anything was learned."""

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by the names of `Tensors`."""
        return {_name(path): value for path, value in trainable(self.module).items()}


def open_base(model: Model) -> Base:
    """Read a base, and put on it what learns.

    Raises:
        InputError: the folder, or what is to learn on it, is not right.
        MachineError: there is too little memory.
        MissingComponentError: peft is not installed.
    """
    folder = Path(model.base)
    source = load_checkpoint(folder)
    tokenizer = SourceTokenizer.load(folder)
    refuse_large_vocabulary(source, tokenizer)
    with machine_errors("load the model", folder):
        module = learner(on_grid(source, model.bits), model.learns, model.rank, model.targets, model.seed)
    labels: tuple[str, ...] = ()
    if source.task == CLASSIFICATION:
        names = module.config.id2label
        labels = tuple(str(names[number]) for number in sorted(names))
    fresh = Base(folder, source.task, model.learns, module, tokenizer, labels, source.positions, {})
    if model.start is not None:
        put(fresh, _stored(fresh, Path(model.start)))
    return Base(**{**vars(fresh), "begun": taken(fresh)})


def start(base: Base) -> Tensors:
    """Return the tensors to begin with."""
    return base.begun


def taken(base: Base) -> dict[str, NDArray[np.float32]]:
    """Return copies of what learns, as it is now."""
    return {name: value.detach().cpu().numpy().copy() for name, value in base.parameters.items()}


@torch.no_grad()
def put(base: Base, tensors: Tensors) -> None:
    """Put values in the place of what learns.

    Raises:
        InputError: other names or shapes than the base has, or values that are not finite.
    """
    parameters = base.parameters
    if strange := sorted(set(tensors) ^ set(parameters)):
        problem = "has no place in" if strange[0] in tensors else "is missing for"
        raise InputError(
            f"{strange[0]} {problem} {base.folder.name}; server and clients need the same base, rank and targets"
        )
    for name, values in tensors.items():
        if tuple(values.shape) != tuple(parameters[name].shape):
            raise InputError(
                f"{name} has shape {tuple(values.shape)} where {base.folder.name} has "
                f"{tuple(parameters[name].shape)}; server and clients need the same base, rank and targets"
            )
        if not np.isfinite(values).all():
            raise InputError(f"{name} holds values that are not finite")
    for name, values in tensors.items():
        parameters[name].copy_(torch.from_numpy(np.array(values, dtype=np.float32)))


def save(base: Base, tensors: Tensors, folder: Path) -> None:
    """Write a peft adapter folder, or of a head the whole checkpoint.

    Raises:
        InputError: the tensors are not the base's.
        MachineError: the disk is full.
    """
    put(base, tensors)
    with machine_errors("write what was learned", folder):
        if base.learns == "adapter":
            folder.mkdir(parents=True, exist_ok=True)
            base.module.peft_config["default"].save_pretrained(str(folder))
            write_adapter(trainable(base.module), folder)
            return
    whole = models.load(base.folder)
    whole.module.load_state_dict(
        {name: torch.from_numpy(np.array(values)) for name, values in tensors.items()}, strict=False
    )
    models.save(whole, folder)


def _stored(base: Base, folder: Path) -> Tensors:
    """Return what an earlier federation learned."""
    if base.learns == "adapter":
        file = folder / ADAPTER_FILE
        if not file.is_file():
            raise InputError(f"{folder}: no adapter to go on from (it has no {ADAPTER_FILE})")
        return {name: value.float().numpy() for name, value in load_file(file).items()}
    weights = load_checkpoint(folder).weights
    return {name: weights[name].float32().numpy() for name in base.parameters if name in weights}


def _name(path: str) -> str:
    return path.replace(".default.", ".")
