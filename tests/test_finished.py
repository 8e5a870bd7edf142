"""Finished weights: found again by the same export and no other, never in half, and removed at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from checkpoints import normal
from conftest import Cli, command, environment

from slm_export.bundles.finished import (
    CACHE_VARIABLE,
    KEEP_VARIABLE,
    Finished,
    finished_weights,
    until_the_end,
)
from slm_export.errors import GateError
from slm_export.optimizers.group_quantize import quantize
from slm_export.weights import Quantized


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> Quantized:
    raise AssertionError("made again")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_finished_weight_is_found_again_bit_for_bit(bits: int) -> None:
    made = quantize(normal(6, 64), bits, 32 if bits == 4 else 64)
    first = finished_weights(["model"])
    kept = first.keep("w", lambda: made)
    second = finished_weights(["model"])
    found = second.keep("w", never)
    for weight in (kept, found):
        assert (weight.shape, weight.bits, weight.group) == (made.shape, made.bits, made.group)
        assert torch.equal(weight.packed, made.packed)
        assert torch.equal(weight.scales, made.scales)
        assert weight.bytes == made.bytes
    assert (first.reused, second.reused) == ([], ["w"])


def test_another_model_or_recipe_finds_nothing() -> None:
    finished_weights(["model", {"bits": 4}]).keep("w", lambda: quantize(normal(4, 32), 4, 32))
    for other in (["other", {"bits": 4}], ["model", {"bits": 8}], ["model"]):
        assert not list(finished_weights(other).folder.iterdir())


def test_a_file_cut_short_is_made_again() -> None:
    made = quantize(normal(4, 32), 4, 32)
    finished = finished_weights(["model"])
    finished.keep("w", lambda: made)
    (file,) = finished.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    again = Finished(finished.folder)
    assert torch.equal(again.keep("w", lambda: made).packed, made.packed)
    assert not again.reused


def test_weights_stay_readable_when_their_files_are_removed() -> None:
    made = quantize(normal(4, 32), 4, 32)
    with until_the_end() as kept:
        kept.append(finished_weights(["model"]))
        weight = kept[0].keep("w", lambda: made)
    assert not kept[0].folder.exists()
    assert torch.equal(weight.packed, made.packed)


@pytest.mark.parametrize(("error", "stays"), [(GateError("x"), False), (KeyboardInterrupt(), True)])
def test_only_an_interrupted_export_leaves_them(error: BaseException, stays: bool) -> None:
    finished = finished_weights(["model"])

    def export() -> None:
        with until_the_end() as kept:
            kept.append(finished)
            raise error

    with pytest.raises(type(error)):
        export()
    assert finished.folder.exists() is stays


def test_one_of_many_exports_leaves_them_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEP_VARIABLE, "1")
    with until_the_end() as kept:
        kept.append(finished_weights(["model"]))
    assert kept[0].folder.exists()


def test_two_exports_of_one_model_at_once_share_and_the_last_one_removes() -> None:
    made = quantize(normal(4, 32), 4, 32)
    with until_the_end() as last:
        last.append(finished_weights(["model"]))
        with until_the_end() as first:
            first.append(finished_weights(["model"]))
            first[0].keep("w", lambda: made)
        assert last[0].folder.exists()
        last[0].keep("w", never)
        last[0].keep("v", lambda: made)
        assert last[0].reused == ["w"]
    assert not last[0].folder.exists()


def test_a_cache_that_is_emptied_meanwhile_takes_nothing_away() -> None:
    made = quantize(normal(4, 32), 4, 32)
    finished = finished_weights(["model"])
    first = finished.keep("v", lambda: made)
    shutil.rmtree(finished.folder)
    second = finished.keep("w", lambda: made)
    shutil.rmtree(finished.folder)
    for kept in (first, second):
        assert torch.equal(kept.packed, made.packed)


def test_what_is_in_use_is_not_removed_however_old() -> None:
    old = finished_weights(["old"])
    os.utime(old.folder, (0, 0))
    finished_weights(["new"])
    assert old.folder.exists()


def test_what_nobody_came_back_for_is_removed() -> None:
    old = finished_weights(["old"])
    assert old.held is not None
    old.held.leave(remove=False)
    os.utime(old.folder, (0, 0))
    finished_weights(["new"])
    assert not old.folder.exists()


def test_a_killed_export_goes_on_and_gives_the_same_bytes(
    tiny_llama: Path, cli: Cli, tmp_path: Path, own_cache: Path
) -> None:
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 20)
    options = ("--target", "host", "--bits", "4", "--no-verify", "--no-bench", "--json")
    killed(command(tiny_llama, *options, "--out", tmp_path / "out"), tmp_path, b"write executorch")
    assert list(own_cache.rglob("*.safetensors"))
    resumed = cli(tiny_llama, *options, "--out", tmp_path / "out")
    assert resumed.returncode == 0, resumed.stderr
    assert not list(own_cache.rglob("*.safetensors"))
    clean = cli(tiny_llama, *options, "--out", tmp_path / "clean")
    notes = [json.loads(done.stdout)["notes"] for done in (resumed, clean)]
    assert [any("finished by an earlier export" in note for note in group) for group in notes] == [
        True,
        False,
    ]
    programs = [(tmp_path / name / "executorch" / "model.pte").read_bytes() for name in ("out", "clean")]
    assert programs[0] == programs[1]


def killed(command: list[str], folder: Path, stage: bytes) -> None:
    """Start an export and kill it in a stage."""
    with open(folder / "log", "wb") as log:
        child = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while stage not in (folder / "log").read_bytes():
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_cache_that_cannot_be_written_is_said(tiny_llama: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ("--target", "host", "--no-verify", "--no-bench", "--json", "--out", tmp_path / "out")
    done = cli(tiny_llama, *options, env={CACHE_VARIABLE: str(tmp_path / "file")})
    assert done.returncode == 0, done.stderr
    assert any("weights are held in memory" in note for note in json.loads(done.stdout)["notes"])
