"""Second moments of what matrices are given: which columns matter, and how to make do with fewer of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Window
from slm_export.graph.model import Encoder, build_reference
from slm_export.source.tasks import GENERATION

_VALUES = 1 << 28
"""Of moments that are gathered at a time; a wide model reads the text several times."""
_DAMPING = 1e-4
"""Share of the mean square that is added to every square: nearly dependent columns stay put."""

Moments = Mapping[str, Callable[[], Tensor]]


@torch.no_grad()
def second_moments(
    checkpoint: Checkpoint,
    matrices: Sequence[str],
    windows: Sequence[Window],
    folder: Path,
    advance: Callable[[int, str], None],
) -> Moments:
    """Return, for linear layers by module name, the mean of x x^T over their inputs x with a 1 put behind.

    Result  float32 (in + 1, in + 1), read from ``folder`` when called for
    """
    model = build_reference(checkpoint)
    files = {name: folder / f"moments-{index:04}.safetensors" for index, name in enumerate(matrices)}
    for together in _groups(checkpoint, matrices):
        found = _gather(model, checkpoint, together, windows, advance)
        for name, moments in found.items():
            save_file({"moments": moments}, files[name])
    return {name: (lambda file=file: load_file(file)["moments"]) for name, file in files.items()}  # type: ignore[misc]


def refit(matrix: Tensor, bias: Tensor | None, moments: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the kept columns of a matrix, and its bias, changed so that its output stays as near as can be.

    Least squares over the inputs that the moments were taken of: with S the columns that go and K those that stay, and
    the bias the column of the constant, W'_K = W_K + W_S C_SK (C_KK + damping)^-1. (OBS, Hassibi and Stork, 1993; for
    columns of a transformer: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022.)

    Given   matrix float32 (out, in), bias (out,) or None, moments (in + 1, in + 1), kept int64 (columns,)
    """
    columns = matrix.shape[1]
    gone = torch.ones(columns, dtype=torch.bool)
    gone[kept] = False
    stay = kept if bias is None else torch.cat((kept, torch.tensor([columns])))
    c = moments.double()
    known = c[stay][:, stay]
    squares = known.diagonal()
    damping = _DAMPING * squares[: len(kept)].mean() * torch.ones(len(stay), dtype=torch.float64)
    if bias is not None:
        damping[-1] = 0  # a constant is exactly known
    known.diagonal().add_(damping + torch.finfo(torch.float64).tiny)
    lost = matrix[:, gone].double() @ c[:columns][gone][:, stay]
    more = torch.linalg.solve(known, lost.t()).t()
    made = (matrix[:, kept].double() + more[:, : len(kept)]).float()
    return made, None if bias is None else (bias.double() + more[:, -1]).float()


def _groups(checkpoint: Checkpoint, matrices: Sequence[str]) -> Iterator[list[str]]:
    together: list[str] = []
    values = 0
    for name in matrices:
        size = (checkpoint.weights[f"{name}.weight"].shape[1] + 1) ** 2
        if together and values + size > _VALUES:
            yield together
            together, values = [], 0
        together.append(name)
        values += size
    yield together


def _gather(
    model: nn.Module,
    checkpoint: Checkpoint,
    names: Sequence[str],
    windows: Sequence[Window],
    advance: Callable[[int, str], None],
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def see(name: str, x: Tensor) -> None:
        x = torch.cat((x.flatten(0, -2), torch.ones(x.shape[:-1].numel(), 1)), 1)
        if name not in totals:
            totals[name] = torch.zeros(x.shape[1], x.shape[1])
        totals[name].addmm_(x.t(), x)
        counts[name] += x.shape[0]

    def hook(name: str) -> Any:
        return lambda _, inputs: see(name, inputs[0])

    inner: nn.Module = model.model if isinstance(model, Encoder) else model
    with ExitStack() as hooks:
        for name in names:
            hooks.callback(inner.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        for window in windows:
            ids = torch.tensor([window])
            if checkpoint.task == GENERATION:
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
            else:
                model(ids, torch.ones_like(ids))
            advance(len(window), "the model reads")
    return {name: total / counts[name] for name, total in totals.items()}
