"""Several processes that train one model, as torchrun starts them; a single one where it did not."""

from __future__ import annotations

import os

import torch


def world() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0 on; the first one writes."""
    return int(os.environ.get("RANK", "0"))


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world() > 1:
        begin()
        torch.distributed.barrier()


def begin() -> None:
    """Join the other processes: over gloo without a GPU, over NCCL with them."""
    if world() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
