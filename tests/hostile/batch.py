"""Inputs of one reader, one after the other, in a process with limits; its parent survives what they do to it.

    python batch.py READER GOOD WORK     inputs, a line each on stdin: ``SEED:NUMBER``, by which they are made, or a
                                         case of the corpus, a folder whose files lie over the good ones

A line of JSON before and after each input; a process that dies in between has died of it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from mutations import spoil  # noqa: E402
from readers import READERS, Reader  # noqa: E402

START_S, SILENCE_S = 300, 45
"""A process that has said nothing for so long hangs in native code: its own limits could not end it."""


def outcomes(
    reader: str, good: Path, inputs: Sequence[str], until: float | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what became of each input, a process after the other until all are through or the time is up.

    Given   inputs: ``SEED:NUMBER`` to make one, or a folder of the corpus
            until: monotonic time at which to stop
    """
    left = list(inputs)
    while left and (until is None or time.monotonic() < until):
        with tempfile.TemporaryDirectory(prefix="hostile-") as work:
            command = [sys.executable, __file__, reader, str(good), work]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as child:
                assert child.stdin
                child.stdin.write("\n".join(left))
                child.stdin.close()
                begun = None
                for line in _lines(child, until, SILENCE_S * READERS[reader].patience):
                    said = json.loads(line)
                    if "begun" in said:
                        begun = said["begun"]
                    else:
                        yield {"input": begun, **said}
                        left.remove(begun)
                        begun = None
                ended = _end(child)
        if begun is None and left and (until is None or time.monotonic() < until):
            raise RuntimeError(f"{reader}: the process ended early ({ended})")
        if begun is not None:
            if until is not None and time.monotonic() >= until:
                return
            what = signal.Signals(-ended).name if ended < 0 else f"exit {ended}"
            yield {
                "input": begun,
                "outcome": "defect",
                "what": f"the process died: {what} (SIGKILL: it hung)",
            }
            left.remove(begun)


def _lines(child: subprocess.Popen[str], until: float | None, silence: float) -> Iterator[str]:
    """Yield lines as they come; none any more once the child is silent for too long, or the time is up."""
    assert child.stdout
    descriptor = child.stdout.fileno()
    os.set_blocking(descriptor, False)
    rest, longest = "", START_S
    while True:
        patience = longest if until is None else min(longest, max(0.0, until - time.monotonic()))
        if not select.select([descriptor], [], [], patience)[0]:
            return
        chunk = os.read(descriptor, 1 << 16).decode()
        if not chunk:
            return
        longest = silence
        *whole, rest = (rest + chunk).split("\n")
        yield from whole


def _end(child: subprocess.Popen[str]) -> int:
    """Return how a process ended: by itself, or because it was silent for too long."""
    try:
        return child.wait(timeout=2)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def prepare(reader: Reader, good: Path, work: Path) -> Path:
    """Lay the good files out for a reader; return the folder that inputs are put into.

    Beside it, ``outside`` holds what no reader may look at.
    """
    shutil.copytree(good / reader.good, work / "good" / reader.good)
    if not (work / "good" / "model").exists():
        shutil.copytree(good / "model", work / "good" / "model")
    (work / "outside").mkdir()
    (work / "outside" / "secret").write_text("secret")
    shutil.copy(good / "model" / "model.safetensors", work / "outside")
    shutil.copytree(good / reader.good, work / reader.good)
    (work / "here").mkdir()
    return work / reader.good


def renew(folder: Path, good: Path, files: Sequence[str]) -> None:
    """Put the good files back where they were changed."""
    for name in files:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        shutil.copy(good / name, path)


def put(folder: Path, given: str, reader: Reader) -> tuple[str, ...]:
    """Make an input in the folder; return the names of the files that are changed."""
    if Path(given).is_dir():
        found = [path for path in Path(given).rglob("*") if path.is_symlink() or path.is_file()]
        names = tuple(path.relative_to(given).as_posix() for path in found)
        for name in names:
            (folder / name).unlink(missing_ok=True)
            shutil.copy(Path(given) / name, folder / name, follow_symlinks=False)
        return names
    spoil(folder, reader.files, Random(f"{reader.name}:{given}"))
    return reader.files


def _serve(reader: Reader, good: Path, work: Path) -> None:
    from watch import Watch, judged, limit_memory

    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        folder = prepare(reader, good, work)
        os.chdir(work / "here")
        own = work / "good" / reader.good
        # Imports are no input's doing, and the good files must be good.
        reader.read(folder)
        watch = Watch()
        watch.look_at(folder, reader.sealed, own)
        limit_memory()
        for given in sys.stdin.read().split("\n"):
            print(json.dumps({"begun": given}), file=answers)
            changed = put(folder, given, reader)
            began = time.monotonic()
            found = judged(reader.read, folder, watch, reader.patience)
            print(json.dumps({**found, "seconds": round(time.monotonic() - began, 3)}), file=answers)
            renew(folder, own, [name for name in changed if (own / name).exists()])


if __name__ == "__main__":
    _serve(READERS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]))
