"""A model whose parameters, gradients and optimizer are shared out among processes (FSDP2, torch's `fully_shard`).

accelerate shares out over GPUs alone; this does it over any device, so that a launch of two processes can be tried
without one. Each block is a unit: its parameters are whole only while it computes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from slm_export.learning.processes import begin, rank, wait_for_all, world

STATE = "sharded.pt"


def shared_out(module: nn.Module) -> nn.Module:
    """Return a copy of a module that is shared out; the module itself stays whole, for what is learned to return to."""
    begin()
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world(),))
    learner = copy.deepcopy(module)
    for part in learner.modules():
        if isinstance(part, nn.ModuleList):
            for block in part:
                fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)
    return learner


def gathered(learner: nn.Module, module: nn.Module) -> None:
    """Put what was learned back into the whole module, in every process."""
    state: dict[str, Any] = dict(
        get_model_state_dict(learner, options=StateDictOptions(full_state_dict=True))
    )
    module.load_state_dict({name: value.to("cpu") for name, value in state.items()})


def write_state(learner: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write parameters and optimizer into a folder, whole, from the first process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, of_optimizer = get_state_dict(learner, optimizer, options=options)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model, "optimizer": of_optimizer}, folder / STATE)
    wait_for_all()


def read_state(learner: nn.Module, optimizer: Any, folder: Path) -> None:
    """Take parameters and optimizer from such a folder."""
    found = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        learner,
        optimizer,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=options,
    )
