"""The loop: transformers' Trainer, with examples in a fixed order, and checkpoints that count only when complete.

A run is decided by its examples, settings and seed: killed at any moment and started again, it goes on from the last
complete checkpoint and ends in the same bytes. That is why the order of examples is written out beforehand, and why a
checkpoint has a mark that is made after everything else of it is on the disk.

Started by torchrun, every process takes its share of each batch, and parameters, gradients and the optimizer's state
are shared out; see `sharding`.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from slm_export.bundles.atomic import sync, sync_tree
from slm_export.errors import InputError, MissingComponentError
from slm_export.learning.places import Place
from slm_export.learning.processes import rank, wait_for_all, world
from slm_export.learning.settings import Training
from slm_export.learning.telling import Teaching
from slm_export.machine import machine_errors
from slm_export.progress import Progress

Example = Mapping[str, Sequence[int]]
"""Names to whole numbers; ``input_ids`` is one of the names, and all lists of one example are as long as that, or of
one number."""
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Measure = Callable[[nn.Module], Mapping[str, float]]
"""Figures of a model on held-out text, taken now and then for the curve."""

IGNORED = -100
"""A label where nothing is to be learned."""
_COMPLETE = "complete"


class Watcher(Protocol):
    """Something that changes with the steps: a temperature, a grid, a source of examples."""

    def before_step(self, step: int) -> None:
        """Prepare step ``step``, counted from 0. What a checkpoint does not hold has to follow from the weights, at
        every multiple of `Training.checkpoint_steps`: a resumed run begins there.
        """


@dataclass(frozen=True)
class Point:
    """One row of a curve. What was not measured at this step is None."""

    step: int
    loss: float | None = None
    """Mean since the point before."""
    rate: float | None = None
    measured: Mapping[str, float] | None = None
    """What `Measure` returned."""


@dataclass(frozen=True)
class Curve:
    """How a run went."""

    points: tuple[Point, ...]
    tokens: int
    """In all examples that the model learned from, padding not counted."""
    seconds: float
    """Of this process; a resumed run counts from where it went on."""
    resumed_at: int | None = None
    """The step that an earlier, killed run had reached; None: from the start."""


def train(
    module: nn.Module,
    examples: Sequence[Example],
    loss: Loss,
    training: Training,
    place: Place,
    progress: Progress,
    *,
    pad_id: int = 0,
    measure: Measure | None = None,
    watchers: Sequence[Watcher] = (),
    name: str = "teach",
    fixed: int | None = None,
) -> Curve:
    """Train ``module`` in place.

    Given   examples: at least one; each epoch goes through them in another order
            loss: called with the module and a batch (see `collate`), returns a scalar
            place: where checkpoints lie; several runs in one place have different names
            pad_id: what fills up input_ids behind short examples
            fixed: pad every batch to so many tokens; None: to its longest example
    Result  the curve; the module is on the device that it was trained on, in evaluation mode

    Raises:
        InputError: no examples, or a loss that is not finite.
        MachineError: the disk is full, or memory is short.
        MissingComponentError: accelerate is not installed.
    """
    if not examples:
        raise InputError("there is nothing to learn from: no example is left of the training text")
    _require_accelerate()
    folder = place.folder / name
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    order = _order(len(examples), training)
    with progress.stage(name, total=training.steps) as stage, machine_errors(name, folder), _quiet():
        learner = _learner(module)
        trainer = _trainer(learner, _Ordered(examples, order), loss, training, folder, pad_id, fixed)
        trainer.teaching.begin(stage, measure, tuple(watchers))
        resumed = _last_complete(folder)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        if learner is not module:
            from slm_export.learning.sharding import gathered

            gathered(learner, module)
    module.eval()
    tokens = sum(len(examples[index]["input_ids"]) for index in order)
    at = None if resumed is None else int(resumed.name.rpartition("-")[2])
    return Curve(_points(trainer.state.log_history), tokens, time.monotonic() - began, at)


def collate(examples: Sequence[Example], pad_id: int, fixed: int | None = None) -> Batch:
    """Return a batch: int64 (examples, longest); ``attention_mask`` 1 for a token and 0 for padding.

    ``labels`` are filled up with -100, input_ids with ``pad_id``, all else with 0. A name that holds single numbers
    becomes (examples,).
    """
    longest = fixed or max(len(example["input_ids"]) for example in examples)
    batch: Batch = {}
    for name in examples[0]:
        rows = [list(example[name]) for example in examples]
        if all(len(row) == 1 for row in rows) and any(len(e["input_ids"]) > 1 for e in examples):
            batch[name] = torch.tensor([row[0] for row in rows])
            continue
        fill = {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)
        batch[name] = torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
    if "attention_mask" not in batch:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def causal_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy of the next token, in nats, mean over the labels that are not -100.

    Without ``labels`` every token but padding is one.
    """
    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return hard_loss(logits, batch)


def hard_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the same of logits (examples, tokens, vocabulary) that are there already."""
    targets = labels_of(batch)[:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED
    )


def labels_of(batch: Batch) -> Tensor:
    """Return the labels of a batch, int64 (examples, tokens): its own, or all tokens but padding."""
    if "labels" in batch:
        return batch["labels"]
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)


class _Ordered(Dataset[Example]):
    """Examples in the order in which they are learned from, epochs one behind the other."""

    def __init__(self, examples: Sequence[Example], order: Sequence[int]) -> None:
        self._examples, self._order = examples, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        return self._examples[self._order[index]]


def _order(count: int, training: Training) -> list[int]:
    """Return the indices of all examples of a run: every epoch holds each once."""
    generator = torch.Generator().manual_seed(training.seed)
    order: list[int] = []
    while len(order) < training.steps * training.batch:
        order += torch.randperm(count, generator=generator).tolist()
    return order[: training.steps * training.batch]


def _points(history: Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
    points = []
    for entry in history:
        step = int(entry["step"])
        if "loss" in entry:
            points.append(Point(step, float(entry["loss"]), float(entry["learning_rate"])))
        elif measured := {
            k.removeprefix("eval_"): float(v) for k, v in entry.items() if k.startswith("eval_")
        }:
            points.append(Point(step, measured=measured))
    return tuple(points)


def _last_complete(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; what a kill cut short is removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            if (path / _COMPLETE).is_file():
                found[int(match[1])] = path
            elif rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
    wait_for_all()
    return found[max(found)] if found else None


def _learner(module: nn.Module) -> nn.Module:
    """Return what is trained: the module itself, or of several processes a copy that is shared out."""
    if world() == 1:
        return module
    from slm_export.learning.sharding import shared_out

    return shared_out(module)


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingComponentError(
            f"teaching a model needs accelerate, which cannot be imported ({error}); "
            "pip install 'slm-export[learning]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from speaking between our lines."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _trainer(
    module: nn.Module,
    dataset: _Ordered,
    loss: Loss,
    training: Training,
    folder: Path,
    pad_id: int,
    fixed: int | None,
) -> Any:
    """Return transformers' Trainer, told our order, our loss and our manners."""
    from transformers import PrinterCallback

    from slm_export.learning.loop import Loop, Manners, arguments

    teaching = Teaching(training)
    trainer = Loop(
        loss,
        teaching,
        model=module,
        args=arguments(training, folder),
        train_dataset=dataset,
        # No data of its own: `Teaching.measure` has them.
        eval_dataset=[],
        data_collator=lambda rows: collate(rows, pad_id, fixed),
        callbacks=[Manners(teaching, mark_complete)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint of which everything is on the disk."""
    sync_tree(checkpoint)
    (checkpoint / _COMPLETE).touch()
    sync(checkpoint)
