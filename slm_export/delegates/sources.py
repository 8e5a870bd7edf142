"""Where events come from: each source looks, and records what it finds together with how far it has looked."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path

from slm_export.delegates import files
from slm_export.delegates.config import Delegate
from slm_export.delegates.schedule import due
from slm_export.delegates.state import Event, State
from slm_export.errors import MachineError

Clock = Callable[[], datetime]
Say = Callable[[str], None]
_MARK = "schedule"
LOOK = timedelta(seconds=20)
"""The clock is looked at so often at least: it may be set."""


def look_at_clock(delegates: Mapping[str, Delegate], state: State, now: datetime, say: Say) -> datetime:
    """Record what is due; return when to look again. The zone of ``now`` is that of cron expressions."""
    zone, now = now.tzinfo or timezone.utc, now.astimezone(timezone.utc)
    again = now + LOOK
    for name, delegate in delegates.items():
        kept = state.marks(name).get(_MARK)
        found = due(delegate.trigger, None if kept is None else datetime.fromisoformat(kept), now, zone)
        if found.note:
            say(f"{name}: {found.note}")
        for at in found.times:
            _record_time(name, delegate, state, at, at.astimezone(zone).isoformat(), say)
        state.mark(name, {_MARK: found.mark.isoformat()})
        again = min(again, found.next or again)
    return again


def _record_time(name: str, delegate: Delegate, state: State, at: datetime, time: str, say: Say) -> None:
    key = at.isoformat()
    mark = {_MARK: key}
    if delegate.trigger.overlap == "skip" and state.next(name) is not None:
        state.record(Event(name, key, "", time), mark, "skipped", "the one before was still at work")
        return
    try:
        text = _read(delegate.trigger.read)
    except MachineError as error:
        say(f"{name}: {error}")
        state.record(Event(name, key, "", time), mark, "failed", str(error))
        return
    state.record(Event(name, key, text, time, delegate.trigger.read or ""), mark)


def _read(path: str | None) -> str:
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            data = file.read(files.LARGEST + 1)
        if len(data) > files.LARGEST:
            raise MachineError(f"{path}: has more than the {files.LARGEST:,} bytes that an input may have")
        return data.decode("utf-8")
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MachineError(f"{path}: is not UTF-8 text") from None


def look_at_files(delegates: Mapping[str, Delegate], state: State, now: datetime, say: Say) -> None:
    """Record the files that changed."""
    for name, delegate in delegates.items():
        marks = state.marks(name)
        for change in files.changes(delegate.trigger, marks):
            if change.problem == "known":
                state.mark(name, change.marks)
                continue
            event = Event(name, change.key, change.text, now.isoformat(), str(change.path))
            if not change.problem:
                state.record(event, change.marks)
            elif state.record(event, change.marks, "failed", change.problem) is not None:
                say(f"{name}: {change.path} {change.problem}")
        state.mark(name, files.begun())


def read_lines(name: str, lines: Iterable[str], state: State, now: Clock, heard: Callable[[], None]) -> None:
    """Record every line."""
    run = uuid.uuid4().hex
    for number, line in enumerate(lines):
        state.record(Event(name, f"{run} {number}", line.rstrip("\n"), now().isoformat()))
        heard()


def watched(delegates: Iterable[Delegate]) -> set[Path]:
    """Return what a watcher is to look at."""
    return {files.watched(delegate.trigger) for delegate in delegates}
