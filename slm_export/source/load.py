"""A model folder -> Checkpoint: names bound to the module's parameters, shapes held against the config.

Three kinds of mistake are caught here, before any work: a weight that is missing, one of another shape
than the configuration says, and a value that is not a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slm_export.checkpoint import Checkpoint, Role
from slm_export.errors import InputError
from slm_export.source.architecture import Architecture, read_architecture
from slm_export.source.shards import first_bad_value, read_shards
from slm_export.weights import Dense


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open a model folder. Reads headers and configuration only, and of the weights at most a tied pair.

    Raises:
        InputError: whatever is wrong with the folder.
    """
    architecture = read_architecture(folder)
    tensors, not_floats = read_shards(folder)
    try:
        module = architecture.empty_module(tensors=len(tensors) + len(not_floats))
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'}: {architecture.name} cannot be built from it: {error}"
        ) from error
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tied = _tied(module)
    weights, unused = _bind(folder, module, tensors, parameters, tied)
    transposed = frozenset(
        f"{name}.weight" for name, child in module.named_modules() if _is_transposed(child)
    )
    return Checkpoint(
        folder=folder,
        name=folder.resolve().name,
        architecture=architecture.name,
        task=architecture.task,
        config=architecture.config,
        weights={
            name: _oriented(weights[name], name in transposed) for name in parameters if name in weights
        },
        roles=_roles(module, tied),
        tied=tied,
        positions=_positions(module),
        transposed=transposed,
        unused={**not_floats, **unused},
    )


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of a checkpoint, with the configuration that its passes left."""
    import transformers

    return Architecture(checkpoint.config, getattr(transformers, checkpoint.architecture), checkpoint.task)


def check_values(checkpoint: Checkpoint, advance: Callable[[int, str], None]) -> None:
    """Read every weight once; InputError at the first NaN or infinity."""
    for name, weight in checkpoint.weights.items():
        if isinstance(weight, Dense) and (bad := first_bad_value(weight.load())):
            raise InputError(
                f"{checkpoint.folder}: weight {name} holds {bad}; the model is damaged or its training diverged"
            )
        advance(1, name)


def _bind(
    folder: Path,
    module: nn.Module,
    tensors: Mapping[str, Dense],
    parameters: Mapping[str, nn.Parameter],
    tied: Mapping[str, str],
) -> tuple[dict[str, Dense], dict[str, str]]:
    """Return the tensors under the names of the module's parameters, and the tensors without a place."""
    weights: dict[str, Dense] = {}
    unused: dict[str, str] = {}
    prefix, renamed = str(getattr(module, "base_model_prefix", "")), _renamings(module)
    for stored, tensor in tensors.items():
        name = _parameter_name(renamed(stored), parameters, prefix)
        if name is None:
            unused[stored] = f"{type(module).__name__} has no such parameter"
            continue
        if tensor.shape != tuple(parameters[name].shape):
            raise InputError(
                f"{folder}: {stored} has shape {tensor.shape}, but config.json makes it "
                f"{tuple(parameters[name].shape)}; the configuration belongs to another model"
            )
        weights[name] = tensor
    for name, owner in tied.items():
        # Stored under either name or both; only the owner's is kept.
        stored_copy = weights.pop(name, None)
        if stored_copy is None:
            continue
        if not torch.equal(weights.setdefault(owner, stored_copy).load(), stored_copy.load()):
            raise InputError(
                f"{folder}: config.json ties {name} to {owner}, but the files hold two different matrices; "
                'the model was trained untied: set "tie_word_embeddings": false in config.json'
            )
    missing = [name for name in parameters if name not in weights and name not in tied]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights of {type(module).__name__} are not in the files, "
            f"{missing[0]} first; the download is incomplete, or config.json belongs to another model"
        )
    return weights, unused


def _renamings(module: nn.Module) -> Callable[[str], str]:
    """Return what transformers calls a tensor of the files today: files keep the names of their day."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    # Renamings alone: a conversion that also merges or splits tensors leaves its parameters missing, and told.
    known = [step for step in get_model_conversion_mapping(module) if isinstance(step, WeightRenaming)]
    return lambda stored: str(apply_renamings(stored, known))


def _parameter_name(stored: str, parameters: Mapping[str, nn.Parameter], prefix: str) -> str | None:
    """Return the parameter that a stored name means: itself, or with the base model's prefix put on or off."""
    for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
        if name in parameters:
            return name
    return None


def _tied(module: nn.Module) -> dict[str, str]:
    """Return parameter -> the parameter it shares a weight with, as the configuration ties them."""
    if not getattr(module.config, "tie_word_embeddings", True):
        return {}
    ties = getattr(module, "all_tied_weights_keys", None) or {}
    return {str(name): str(owner) for name, owner in ties.items()}


def _roles(module: nn.Module, tied: Mapping[str, str]) -> dict[str, Role]:
    embedding, head = module.get_input_embeddings(), _head(module)  # type: ignore[operator]
    roles: dict[str, Role] = {}
    for path, child in module.named_modules():
        for parameter, _ in child.named_parameters(recurse=False):
            name = f"{path}.{parameter}" if path else parameter
            role: Role = "other"
            if parameter == "weight":
                if child is embedding:
                    role = "embedding"
                elif isinstance(child, nn.Embedding):
                    role = "table"
                elif child is head:
                    role = "head"
                elif isinstance(child, nn.Linear) or _is_transposed(child):
                    role = "linear"
            if name not in tied:
                roles[name] = role
    return roles


def _positions(module: nn.Module) -> int | None:
    """Return the most tokens of one input.

    RoBERTa and its kin count positions from behind the padding token, so their table has rows to spare.
    """
    for path, child in module.named_modules():
        if isinstance(child, nn.Embedding) and "position_embedding" in path and child.padding_idx is not None:
            return int(child.num_embeddings) - int(child.padding_idx) - 1
    config: Any = module.config
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return None if most is None else int(most)


def _head(module: nn.Module) -> nn.Module | None:
    get = getattr(module, "get_output_embeddings", None)
    return get() if callable(get) else None


def _is_transposed(child: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(child, Conv1D)


def _oriented(weight: Dense, transposed: bool) -> Dense:
    if not transposed:
        return weight
    rows, columns = weight.shape
    return Dense((columns, rows), weight.dtype, lambda: weight.load().t().contiguous())
