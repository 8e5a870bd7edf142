"""Kill an export, fill its disk, take its folders away: what is there afterwards, and what the next export makes of it.

    python benchmarks/mishaps.py                       # 100 kills, 20 points of a full disk, and the rest
    python benchmarks/mishaps.py --stand-in --seed 7   # in minutes: nothing is traced

The model is a tiny one and the format onnx, because what is asked here is the same for all. Every mishap is followed by
an ordinary export (tests/arena.py says what must hold). Full and read-only disks are small file systems mounted for
the purpose; where that is not permitted they are left out, and said to be. Ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import arena as harness  # noqa: E402
from arena import Arena, Outcome  # noqa: E402
from conftest import ROOT, TOKENIZER_FILES, save_tiny_llama  # noqa: E402
from forked import Forked  # noqa: E402

ARRANGEMENTS = (
    (("work", "cache", "tmp"), "all three places"),
    (("work",), "the bundle"),
    (("cache",), "the cache"),
)
Case = tuple[str, Callable[[], Outcome]]


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--kills", type=int, default=100)
    asked.add_argument("--points", type=int, default=20, help="points at which a disk is full")
    asked.add_argument("--vanish", type=int, default=12, help="folders that vanish")
    asked.add_argument(
        "--stand-in", action="store_true", help="trace nothing; artifacts are the weights' bytes"
    )
    asked.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = asked.parse_args()
    moments = random.Random(options.seed)
    table: dict[str, list[Outcome]] = {}
    with TemporaryDirectory(prefix="mishaps-") as folder:
        root, model = Path(folder) / "arena", tiny_llama(Path(folder) / "tiny-llama")
        traced = None if options.stand_in else model
        with harness.server(root, traced) as run, harness.server(root, traced) as other:
            arena = Arena(root, model, run)
            print(f"seed {options.seed}; an undisturbed export takes {arena.seconds:.1f} s")
            try:
                with harness.small_disk(Path(folder) / "disk") as disk:
                    record(table, disked(arena, disk, options.points))
            except harness.NoVolumeError as error:
                print(f"left out: {error}")
            record(table, pairs(arena, other))
            record(table, vanishing(arena, moments, options.vanish))
            record(table, kills(arena, moments, options.kills))
    print(f"\n{markdown(table)}")
    failed = sum(bool(outcome.problems) for outcomes in table.values() for outcome in outcomes)
    print(f"{sum(map(len, table.values()))} mishaps, {failed} with something that did not hold")
    return 1 if failed else 0


def tiny_llama(folder: Path) -> Path:
    save_tiny_llama(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples" / "pycode-5m" / name, folder / name)
    return folder


def kills(arena: Arena, moments: random.Random, count: int) -> Iterator[Case]:
    """Yield kills at random moments: half of them anywhere, half where the bundle is put together and in its place."""
    for number in range(count):
        with_old, last = bool(number % 2), bool(number // 2 % 2)
        if last:
            at = moments.uniform(0, arena.last_seconds)
            yield "killed at the end", partial(harness.killed, arena, with_old, at, harness.WRITTEN)
        else:
            at = moments.uniform(0, arena.seconds)
            yield "killed anywhere", partial(harness.killed, arena, with_old, at)


def vanishing(arena: Arena, moments: random.Random, count: int) -> Iterator[Case]:
    """Yield folders that vanish while an export runs."""
    places = (("cache", "cache"), ("work", "destination"), ("partial", "unfinished bundle"))
    for number in range(count):
        place, name = places[number % 3]
        at, with_old = moments.uniform(0, arena.working_seconds), bool(number // 3 % 2)
        yield f"{name} vanishes", partial(harness.vanished, arena, place, at, with_old)


def pairs(arena: Arena, other: Forked) -> Iterator[Case]:
    """Yield two exports at once."""
    for with_old in (False, True):
        yield "two into one folder", partial(harness.at_once, arena, other, with_old)
    yield "two of one model", partial(harness.side_by_side, arena, other)


def disked(arena: Arena, disk: Path, points: int) -> Iterator[Case]:
    """Yield what needs a disk: full at points from nothing to almost enough, and read-only."""
    for index, (places, name) in enumerate(ARRANGEMENTS):
        need = harness.peak_use(arena, disk, places)
        print(f"an undisturbed export has up to {need:,} bytes on the disk of {name}", flush=True)
        own = range(index, points, len(ARRANGEMENTS))
        for number in own:
            free, with_old = need * number // points, bool(number % 2)
            yield f"disk of {name} full", partial(harness.on_a_full_disk, arena, disk, places, free, with_old)
    for place, name in (("work", "destination"), ("cache", "cache")):
        yield f"{name} read-only", partial(harness.read_only, arena, disk, place)


def record(table: dict[str, list[Outcome]], cases: Iterator[Case]) -> None:
    for name, case in cases:
        outcome = case()
        table.setdefault(name, []).append(outcome)
        said = "; ".join(outcome.problems) or "held"
        print(
            f"{name:32} {outcome.code:4} {outcome.found:5} {'resumed' * outcome.resumed:8} {said}", flush=True
        )


def markdown(table: dict[str, list[Outcome]]) -> str:
    """Return a line for each kind of mishap."""
    lines = [
        "| mishap | times | exit codes | bundle afterwards | resumed | did not hold |",
        "| --- |" + " --- |" * 5,
    ]
    for name, outcomes in table.items():
        codes, found = (
            Counter(values) for values in zip(*((o.code, o.found) for o in outcomes), strict=True)
        )
        cells = [
            name,
            str(len(outcomes)),
            _counted(codes),
            _counted(found),
            str(sum(outcome.resumed for outcome in outcomes)),
            str(sum(bool(outcome.problems) for outcome in outcomes)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _counted(counter: Counter) -> str:  # type: ignore[type-arg]
    return ", ".join(f"{value}: {count}" for value, count in sorted(counter.items()))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
