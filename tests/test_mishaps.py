"""Kills, full disks and folders that vanish; `benchmarks/mishaps.py` does the same at length, to artifacts of ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import arena as harness
import pytest
from arena import Arena, Outcome
from forked import Forked


@pytest.fixture(scope="module")
def other(arena_root: Path) -> Iterator[Forked]:
    with harness.server(arena_root) as run:
        yield run


@pytest.fixture(scope="module")
def arena_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mishaps") / "arena"


@pytest.fixture(scope="module")
def arena(arena_root: Path, tiny_llama: Path) -> Iterator[Arena]:
    with harness.server(arena_root) as run:
        yield Arena(arena_root, tiny_llama, run)


def held(outcome: Outcome) -> bool:
    assert outcome.problems == []
    return True


@pytest.mark.parametrize(("share", "with_old"), [(0.3, False), (0.5, True), (0.7, False)])
def test_a_kill_leaves_the_old_bundle_or_the_new_one(arena: Arena, share: float, with_old: bool) -> None:
    assert held(harness.killed(arena, with_old, share * arena.seconds))


@pytest.mark.parametrize(("share", "with_old"), [(0.3, True), (0.5, False), (0.7, True)])
def test_a_kill_while_the_bundle_is_put_together(arena: Arena, share: float, with_old: bool) -> None:
    assert held(harness.killed(arena, with_old, share * arena.last_seconds, harness.WRITTEN))


def test_disks_that_are_full_or_cannot_be_written(arena: Arena, tmp_path: Path) -> None:
    try:
        with harness.small_disk(tmp_path / "disk") as disk:
            need = harness.peak_use(arena, disk, harness.PLACES)
            full = [
                harness.on_a_full_disk(arena, disk, harness.PLACES, need * part // 4, bool(part % 2))
                for part in range(4)
            ]
            read_only = [harness.read_only(arena, disk, place) for place in ("work", "cache")]
    except harness.NoVolumeError as error:
        pytest.skip(str(error))
    assert all(held(outcome) for outcome in (*full, *read_only))
    assert [outcome.code for outcome in full] == [4] * 4
    assert [outcome.found for outcome in full] == ["none", "old", "none", "old"]


@pytest.mark.parametrize("place", ["cache", "work", "partial"])
def test_a_folder_that_vanishes_takes_nothing_else_along(arena: Arena, place: str) -> None:
    for share in (0.3, 0.6):
        assert held(harness.vanished(arena, place, share * arena.working_seconds, with_old=share > 0.5))


@pytest.mark.slow  # another server; tests/test_staging.py has the same without a command line
def test_a_second_export_into_the_same_folder_is_refused(arena: Arena, other: Forked) -> None:
    assert held(harness.at_once(arena, other, with_old=True))


@pytest.mark.slow
def test_two_exports_of_one_model_share_a_cache(arena: Arena, other: Forked) -> None:
    assert held(harness.side_by_side(arena, other))
