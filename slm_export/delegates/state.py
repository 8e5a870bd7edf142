"""What was triggered and what came of it, in one SQLite file (https://sqlite.org/atomiccommit.html).

A trigger is recorded, with its input, in the transaction that also moves the mark of its source (a schedule's last
time, a file's last content). What is recorded goes through these states, each a transaction:

    waiting -> answered -> done          or failed, with a reason; skipped, where overlap says so

A process that is killed leaves it in one of them, and the next goes on from there: an answer is computed again only if
it was not recorded, and delivered again only if the kill fell between a delivery and its record. A delivery carries the
trigger's id, so that the receiver can tell; a file of ours is looked into.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_export.errors import InputError, MachineError

SCHEMA = 1
_KEPT = 10_000
"""Triggers of a delegate that are remembered once they are over."""
_TABLES = """
CREATE TABLE IF NOT EXISTS triggers (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    delegate  TEXT NOT NULL,
    key       TEXT NOT NULL,
    text      TEXT NOT NULL,
    path      TEXT NOT NULL,
    time      TEXT NOT NULL,
    private   INTEGER NOT NULL,
    state     TEXT NOT NULL CHECK (state IN ('waiting', 'answered', 'done', 'failed', 'skipped')),
    attempts  INTEGER NOT NULL DEFAULT 0,
    answer    TEXT,
    place     TEXT,
    detail    TEXT NOT NULL DEFAULT '',
    UNIQUE (delegate, key)
);
CREATE INDEX IF NOT EXISTS open_triggers ON triggers (delegate, id) WHERE state IN ('waiting', 'answered');
CREATE TABLE IF NOT EXISTS marks (
    delegate  TEXT NOT NULL,
    name      TEXT NOT NULL,
    value     TEXT NOT NULL,
    PRIMARY KEY (delegate, name)
);
"""


@dataclass(frozen=True)
class Event:
    """Something that sets a delegate off."""

    delegate: str
    key: str
    """The same for the same event, however often it is seen."""
    text: str
    time: str
    """When, in ISO 8601."""
    path: str = ""
    private: bool = False


@dataclass(frozen=True)
class Trigger:
    """A recorded event, and how far it is."""

    id: int
    delegate: str
    text: str
    path: str
    time: str
    private: bool
    state: str
    attempts: int
    answer: str | None
    place: str | None
    detail: str


class State:
    """The file; one process at a time, any of its threads."""

    def __init__(self, path: Path, *, reading: bool = False) -> None:
        """Open it; to read what another process writes, ``reading``.

        Raises:
            InputError: another process has it, or it is none of ours.
            MachineError: it cannot be read or written.
        """
        self._lock = threading.Lock()
        self._held = None if reading else _only_one(path)
        try:
            self._base = _opened(path, reading)
        except sqlite3.DatabaseError as error:
            self._let_go()
            raise InputError(f"{path}: no state of delegates: {error}") from None
        except InputError:
            self._let_go()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)

    def record(
        self, event: Event, marks: Mapping[str, str] | None = None, state: str = "waiting", detail: str = ""
    ) -> int | None:
        """Record an event and move marks of its delegate, both or neither; None where it was recorded before."""
        with self._transaction() as base:
            row = base.execute(
                "INSERT INTO triggers (delegate, key, text, path, time, private, state, detail) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING id",
                (event.delegate, event.key, event.text, event.path, event.time, event.private, state, detail),
            ).fetchone()
            self._mark(base, event.delegate, marks or {})
        return None if row is None else int(row["id"])

    def mark(self, delegate: str, marks: Mapping[str, str]) -> None:
        """Move marks alone."""
        with self._transaction() as base:
            self._mark(base, delegate, marks)

    def marks(self, delegate: str) -> dict[str, str]:
        """Return the marks of a delegate."""
        rows = self._rows("SELECT name, value FROM marks WHERE delegate = ?", delegate)
        return {row["name"]: row["value"] for row in rows}

    def next(self, delegate: str) -> Trigger | None:
        """Return the oldest trigger that is not over."""
        found = self._rows(
            "SELECT * FROM triggers WHERE delegate = ? AND state IN ('waiting', 'answered') ORDER BY id LIMIT 1",
            delegate,
        )
        return _trigger(found[0]) if found else None

    def answered(self, id: int, answer: str, place: str, detail: str) -> None:
        """Keep an answer; what is delivered now is never computed again."""
        self._change(
            id, "state = 'answered', answer = ?, place = ?, detail = ?, attempts = 0", answer, place, detail
        )

    def attempted(self, id: int, detail: str) -> None:
        """Count an attempt that failed."""
        self._change(id, "attempts = attempts + 1, detail = ?", detail)

    def over(self, id: int, state: str, detail: str = "") -> None:
        """End a trigger; its input and answer are forgotten: they may be private."""
        self._change(id, "state = ?, detail = ?, text = '', answer = NULL", state, detail)

    def prune(self, delegate: str, kept: int = _KEPT) -> None:
        """Forget the oldest of those that are over."""
        with self._transaction() as base:
            base.execute(
                "DELETE FROM triggers WHERE delegate = ? AND state NOT IN ('waiting', 'answered') AND id NOT IN "
                "(SELECT id FROM triggers WHERE delegate = ? ORDER BY id DESC LIMIT ?)",
                (delegate, delegate, kept),
            )

    def counts(self, delegate: str) -> dict[str, int]:
        """Return how many triggers are in each state."""
        rows = self._rows(
            "SELECT state, COUNT(*) AS n FROM triggers WHERE delegate = ? GROUP BY state", delegate
        )
        return {row["state"]: row["n"] for row in rows}

    def last(self, delegate: str, count: int = 1) -> list[Trigger]:
        """Return the newest triggers."""
        rows = self._rows(
            "SELECT * FROM triggers WHERE delegate = ? ORDER BY id DESC LIMIT ?", delegate, count
        )
        return [_trigger(row) for row in rows]

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._base.execute(query, values).fetchall()

    def _change(self, id: int, what: str, *values: Any) -> None:
        with self._transaction() as base:
            base.execute(f"UPDATE triggers SET {what} WHERE id = ?", (*values, id))

    @staticmethod
    def _mark(base: sqlite3.Connection, delegate: str, marks: Mapping[str, str]) -> None:
        rows = [(delegate, name, value) for name, value in marks.items()]
        base.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", rows)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._base.execute("BEGIN IMMEDIATE")
                try:
                    yield self._base
                except BaseException:
                    self._base.execute("ROLLBACK")
                    raise
                self._base.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise MachineError(f"the state of the delegates cannot be written: {error}") from error


def _opened(path: Path, reading: bool) -> sqlite3.Connection:
    base = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    version = base.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA):
        base.close()
        raise InputError(f"{path}: schema {version}; this slm-export reads {SCHEMA}")
    if reading and version == 0:  # just being made by the one that writes
        base.close()
        base = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        base.executescript(_TABLES)
    if not reading:
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        # In one transaction: a reader sees no table, or all of them.
        base.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
    base.row_factory = sqlite3.Row
    return base


def _trigger(row: sqlite3.Row) -> Trigger:
    kept = {name: row[name] for name in Trigger.__dataclass_fields__}
    return Trigger(**{**kept, "private": bool(kept["private"])})


def _only_one(path: Path) -> int:
    """Hold a lock beside the file for as long as this process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise InputError(f"{path}: another `slm-export delegate run` has it; end that one first") from None
    return held
