"""Every reader accepts a file or refuses it with a message, whatever is in it.

`benchmarks/fuzz.py` is the campaign; here are a few hundred inputs of it, and those that once broke something.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "hostile"))

from batch import prepare, put, renew  # noqa: E402
from mutations import CANARY, spoil  # noqa: E402
from readers import READERS  # noqa: E402
from watch import Watch, judged  # noqa: E402

GOOD, CORPUS = HERE / "hostile" / "good", HERE / "corpus"
CASES = sorted(path for path in CORPUS.glob("*/*") if path.is_dir())
CHEAP = [name for name, reader in READERS.items() if reader.cheap and not reader.vendor]


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


class Bench:
    """A reader, its folder, and the watch that looks at it."""

    def __init__(self, name: str, place: Path, watch: Watch) -> None:
        self.reader = READERS[name]
        self.folder = prepare(self.reader, GOOD, place)
        self.good = place / "good" / self.reader.good
        self.watch = watch
        self.reader.read(self.folder)  # imports are no input's doing

    def judge(self, make: Any) -> dict[str, str]:
        """Make an input, tell what becomes of it, and put the good files back."""
        self.watch.look_at(self.folder, self.reader.sealed, self.good)
        changed = make(self.folder) or self.reader.files
        try:
            return judged(self.reader.read, self.folder, self.watch)
        finally:
            for name in changed:
                if not (self.good / name).exists():
                    (self.folder / name).unlink()
            renew(self.folder, self.good, [name for name in changed if (self.good / name).exists()])


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory, watch: Watch) -> Any:
    """Every reader that is asked for, made once."""
    made: dict[str, Bench] = {}
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("here"))

    def bench(name: str) -> Bench:
        if name not in made:
            made[name] = Bench(name, tmp_path_factory.mktemp(name), watch)
        return made[name]

    yield bench
    os.chdir(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_what_once_broke_a_reader_is_refused(benches: Any, case: Path) -> None:
    bench = benches(case.parent.name)
    found = bench.judge(lambda folder: put(folder, str(case), bench.reader))
    assert found["outcome"] == "refused", found["what"]


@pytest.mark.parametrize("name", CHEAP)
def test_a_spoilt_file_is_accepted_or_refused(benches: Any, name: str) -> None:
    bench = benches(name)

    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(use_true_random=False))
    def holds(random: Any) -> None:
        found = bench.judge(lambda folder: spoil(folder, bench.reader.files, random))
        assert found["outcome"] != "defect", found["what"]

    holds()


@pytest.mark.parametrize("name", [*CHEAP, "coreml"])
def test_a_pipe_in_place_of_a_file_does_not_block(benches: Any, name: str) -> None:
    bench = benches(name)

    def exchange(folder: Path) -> None:
        (folder / bench.reader.files[-1]).unlink()
        os.mkfifo(folder / bench.reader.files[-1])

    found = bench.judge(exchange)
    assert found["outcome"] != "defect", found["what"]


def _opens_outside(folder: Path) -> None:
    (folder.parent / "outside" / "secret").read_text()


def _connects(folder: Path) -> None:
    import socket

    socket.getaddrinfo("127.0.0.1", 9)


def _runs_code(folder: Path) -> None:
    exec(compile("1", str(folder / "modeling_mine.py"), "exec"))


def _unpickles(folder: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(os.getcwd))


def _makes_the_folder(folder: Path) -> None:
    os.mkdir(CANARY)


def _takes_memory(folder: Path) -> None:
    assert bytearray(b"x" * (500 << 20))


def _breaks(folder: Path) -> None:
    raise KeyError("model_type")


def _says_nothing(folder: Path) -> None:
    from slm_export.errors import InputError

    raise InputError("")


@pytest.mark.parametrize(
    "read",
    [
        _opens_outside,
        _connects,
        _runs_code,
        _unpickles,
        _makes_the_folder,
        _takes_memory,
        _breaks,
        _says_nothing,
    ],
)
def test_the_watch_sees_what_no_input_may_do(benches: Any, watch: Watch, read: Any) -> None:
    bench = benches("text")
    watch.look_at(bench.folder, True, bench.good)
    assert judged(read, bench.folder, watch)["outcome"] == "defect"
