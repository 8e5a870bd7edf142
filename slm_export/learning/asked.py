"""Every question asked once: an answer is on the disk before the next one is counted, whatever happens then.

Answers lie under a hash of all that decides what the teacher says, not of how the child is tuned: they cost money or
hours, and serve the next run with other settings too. Those that nobody came back for are removed after a week.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from slm_export.bundles.finished import cache_folder
from slm_export.errors import MachineError
from slm_export.learning.problems import Problem
from slm_export.learning.teaching import Question, ReasoningTeacher, Solution
from slm_export.machine import machine_errors
from slm_export.progress import Progress

_FORGOTTEN_S = 7 * 24 * 3600.0
_TABLE = """
    CREATE TABLE IF NOT EXISTS solutions (
        problem TEXT, seed INTEGER, text TEXT NOT NULL, finished INTEGER NOT NULL, PRIMARY KEY (problem, seed)
    )"""


def ask(
    teacher: ReasoningTeacher, problems: Sequence[Problem], samples: int, seed: int, progress: Progress
) -> dict[tuple[str, int], Solution]:
    """Return the teacher's solutions: (key of the problem, sample) -> solution, in the order of the problems.

    Raises:
        InputError, MachineError: as of the teacher; what it has answered until then is kept.
    """
    questions = [
        Question(problem.key, problem.text, sample, _seed(seed, problem.key, sample))
        for problem in problems
        for sample in range(samples)
    ]
    chunks = [questions[at : at + teacher.chunk] for at in range(0, len(questions), teacher.chunk)]
    with _kept(teacher) as kept:
        missing = [chunk for chunk in chunks if any(kept.get(question) is None for question in chunk)]
        with progress.stage("ask the teacher", total=len(questions)) as stage:
            stage.advance(len(questions) - sum(map(len, missing)))
            for count in _answered(teacher, missing, kept):
                stage.advance(count)
        found = {(question.key, question.sample): kept.get(question) for question in questions}
    return {key: solution for key, solution in found.items() if solution is not None}


class Kept:
    """The solutions of one teacher, in a database that a kill leaves whole."""

    def __init__(self, path: Path) -> None:
        self._lock, self._closed = threading.Lock(), False
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.execute(_TABLE)

    def get(self, question: Question) -> Solution | None:
        """Return what was answered, or None."""
        with self._lock:
            row = self._database.execute(
                "SELECT text, finished FROM solutions WHERE problem = ? AND seed = ?",
                (question.key, question.seed),
            ).fetchone()
        return None if row is None else Solution(row[0], bool(row[1]))

    def keep(self, question: Question, solution: Solution) -> None:
        """Store an answer durably; of two to the same question the first stays."""
        # A half of a surrogate pair, which JSON can carry, is no UTF-8.
        text = solution.text.encode("utf-8", "replace").decode("utf-8")
        with self._lock:
            if self._closed:
                return
            self._database.execute(
                "INSERT OR IGNORE INTO solutions VALUES (?, ?, ?, ?)",
                (question.key, question.seed, text, int(solution.finished)),
            )

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._closed = True
            self._database.close()


def _answered(teacher: ReasoningTeacher, chunks: Sequence[list[Question]], kept: Kept) -> Iterator[int]:
    """Ask, several chunks at once where the teacher can; yield how many questions were answered.

    The first error or an interrupt ends it; an answer that is still under way then is neither waited for nor kept.
    """

    def answer(chunk: list[Question]) -> int:
        for question, solution in zip(chunk, teacher.solve(chunk), strict=True):
            kept.keep(question, solution)
        return len(chunk)

    if teacher.at_once == 1:
        yield from map(answer, chunks)
        return
    waiting, outcomes = queue.SimpleQueue[list[Question]](), queue.SimpleQueue[int | BaseException]()
    for chunk in chunks:
        waiting.put(chunk)
    over = threading.Event()

    def work() -> None:
        with suppress(queue.Empty):
            while not over.is_set():
                try:
                    outcomes.put(answer(waiting.get_nowait()))
                except queue.Empty:
                    raise
                except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
                    outcomes.put(error)
                    return

    try:
        for _ in range(teacher.at_once):
            # Daemons, so that a teacher which does not answer keeps no interrupted command alive.
            threading.Thread(target=work, name="ask", daemon=True).start()
        for _ in chunks:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        over.set()


@contextmanager
def _kept(teacher: ReasoningTeacher) -> Iterator[Kept]:
    """Open what this teacher has answered before; errors of the database are the machine's."""
    root = cache_folder() / "answers"
    name = hashlib.sha256(json.dumps(teacher.identity, sort_keys=True).encode()).hexdigest()[:32]
    path = root / f"{name}.sqlite"
    with machine_errors("keep the teacher's answers", path):
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_forgotten(root)
            kept = Kept(path)
            os.utime(path)
            try:
                yield kept
            finally:
                kept.close()
        except sqlite3.Error as error:
            raise MachineError(
                f"{path}: the teacher's answers cannot be kept ({error}); free some space, or remove the file"
            ) from error


def _remove_forgotten(root: Path) -> None:
    for path in root.glob("*.sqlite*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                path.unlink()


def _seed(seed: int, key: str, sample: int) -> int:
    """Return a seed of 31 bits for one question, the same wherever in the file the problem stands."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}:{sample}".encode()).digest()[:4], "big") >> 1
