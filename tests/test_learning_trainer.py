"""The loop: the same run every time, also when it was killed; what it refuses; what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from slm_export.bundles.finished import CACHE_VARIABLE
from slm_export.errors import InputError
from slm_export.learning.models import load, save
from slm_export.learning.places import place
from slm_export.learning.settings import Training
from slm_export.learning.trainer import IGNORED, Example, causal_loss, collate, train
from slm_export.progress import Progress

KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_learning_trainer import taught
taught(Path(sys.argv[2]), Path(sys.argv[3]), hangs=8)
"""
TRAINING = Training(steps=12, batch=4, together=2, length=16, rate=1e-2, checkpoint_every=3, measure_every=4)


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(4, 4000, (16,), generator=generator).tolist()} for _ in range(10)]


class Hangs:
    """Waits in a step until it is killed."""

    def __init__(self, step: int) -> None:
        self._step = step

    def before_step(self, step: int) -> None:
        while step == self._step:
            time.sleep(1)


def taught(folder: Path, out: Path, training: Training = TRAINING, hangs: int = -1) -> bytes:
    """Train for a few steps, save, and return the bytes of the weights."""

    model = load(folder)
    with place({"what": "test", **training.recorded()}) as work:
        train(
            model.module,
            examples(),
            causal_loss,
            training,
            work,
            Progress(silent=True),
            measure=lambda module: {"first": float(next(module.parameters()).flatten()[0].detach())},
            watchers=[Hangs(hangs)],
        )
        save(model, out)
        work.done()
    return (out / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_run(tiny_llama: Path, tmp_path: Path) -> None:
    first = taught(tiny_llama, tmp_path / "a")
    assert first == taught(tiny_llama, tmp_path / "b")
    assert first != taught(tiny_llama, tmp_path / "c", TRAINING.model_copy(update={"seed": 1}))


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    whole = taught(tiny_llama, tmp_path / "whole")
    own = tmp_path / "cache"
    environment = {**os.environ, CACHE_VARIABLE: str(own), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), tiny_llama, tmp_path / "killed"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not list(own.glob("learning/*/teach/checkpoint-6/complete")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    # As a kill in the middle of writing leaves it: without the mark.
    (torn,) = own.glob("learning/*/teach")
    (torn / "checkpoint-9").mkdir()
    (torn / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    before = os.environ[CACHE_VARIABLE]
    os.environ[CACHE_VARIABLE] = str(own)
    try:
        resumed = taught(tiny_llama, tmp_path / "resumed")
    finally:
        os.environ[CACHE_VARIABLE] = before
    assert resumed == whole
    assert not list(own.glob("learning/*"))


def test_a_checkpoint_is_complete_or_not_there(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    """A run that fails leaves what it has; the next one goes on from there and clears it away."""

    class Breaks:
        def before_step(self, step: int) -> None:
            if step == 7:
                raise OSError(28, "No space left on device")

    model = load(tiny_llama)
    with pytest.raises(Exception, match="disk full"), place({"what": "breaks"}) as work:
        train(
            model.module, examples(), causal_loss, TRAINING, work, Progress(silent=True), watchers=[Breaks()]
        )
    kept = sorted(path.parent.name for path in work.folder.glob("teach/*/complete"))
    assert kept == ["checkpoint-3", "checkpoint-6"]


def test_a_loss_that_is_not_finite_is_an_error_of_the_settings(tiny_llama: Path) -> None:
    def endless(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return causal_loss(module, batch) * float("inf")

    model = load(tiny_llama)
    with (
        pytest.raises(InputError, match="diverged; lower the learning rate"),
        place({"what": "endless"}) as work,
    ):
        train(model.module, examples(), endless, TRAINING, work, Progress(silent=True))


def test_two_processes_do_not_work_on_one_result() -> None:
    with (
        place({"what": "twice"}),
        pytest.raises(InputError, match="another process"),
        place({"what": "twice"}),
    ):
        pass


def test_a_batch_is_padded_and_says_where() -> None:
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}], 2
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_padding_is_no_part_of_the_loss(tiny_llama: Path) -> None:
    module = load(tiny_llama).module
    alone = causal_loss(module, collate([{"input_ids": [5, 6, 7]}], 2))
    padded = causal_loss(module, collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], 2))
    torch.testing.assert_close(alone, padded)
