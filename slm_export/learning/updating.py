"""What adapt and reason share: a model learns as a whole, by adapters of low rank, or on the grid that will ship."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slm_export.errors import InputError
from slm_export.learning.adapters import low_rank
from slm_export.learning.distil_settings import Grid
from slm_export.learning.grid import OnGrid, put_on_grid, stored_as
from slm_export.learning.models import Model, save
from slm_export.learning.places import Place
from slm_export.learning.settings import Training
from slm_export.learning.trainer import Curve, Example, Loss, Watcher, train
from slm_export.progress import Progress
from slm_export.source.load import load_checkpoint


def refuse_adapters_on_a_grid(rank: int, grid: Grid | None) -> None:
    """Raise InputError where both are asked for."""
    if rank and grid is not None:
        raise InputError(
            "--low-rank and --for-bits: what adapters learn is merged into the weights in the end, and would leave the "
            "grid; give one of them"
        )


def update(
    model: Model,
    examples: Sequence[Example],
    loss: Loss,
    training: Training,
    place: Place,
    progress: Progress,
    name: str,
    *,
    rank: int = 0,
    grid: Grid | None = None,
    whole: tuple[str, ...] = (),
) -> Curve:
    """Train a model in place.

    Given   rank: of adapters, which are merged then; 0: the whole model learns
            grid: what it is trained for; `settle` puts the result on it
            whole: parts that learn as a whole beside adapters
    """
    refuse_adapters_on_a_grid(rank, grid)
    watchers: list[Watcher] = []
    if grid is not None:
        start = place.once("start", lambda path: save(model, path, torch.float32))
        on_grid = OnGrid(loss, model.module, load_checkpoint(start), grid, training)
        watchers.append(on_grid)
        loss = on_grid
    pad = model.tokenizer.pad_id
    with low_rank(model.module, rank, training.seed, whole) as (learner, merge):
        curve = train(
            learner, examples, loss, training, place, progress, pad_id=pad, watchers=watchers, name=name
        )
        merge()
    return curve


def settle(model: Model, grid: Grid | None, place: Place) -> torch.dtype | None:
    """Put what was trained for a grid on it, and return the type to save it in; None: as it was stored before."""
    if grid is None:
        return None
    folder = place.folder / "settling"
    save(model, folder, torch.float32)
    put_on_grid(model.module, stored_as(load_checkpoint(folder), grid))
    return torch.float32  # values of the grid are exact in it
