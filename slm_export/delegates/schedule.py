"""When a schedule is due. APScheduler knows cron, zones and summer time; the mark of what was due is ours, and kept.

A time that is due is an event whose key is that time, so that it is recorded once however the clock moves:

- missed times (nothing ran, the machine slept) are taken up by `missed`: the newest alone, all, or none;
- a clock that is set back repeats no time of a cron schedule that was there before;
- a clock that was far ahead (more than a day) and is set right starts the schedule anew.

Instants are in UTC here: of two with one zone Python compares what clocks on the wall show, which go back in autumn.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

from apscheduler.triggers.cron import CronTrigger

from slm_export.delegates.triggers import Trigger, duration_s

LATE = timedelta(seconds=60)
"""A time that was due this long ago was missed."""
MOST = 100
"""Missed times that are taken up at once."""
_WRONG = timedelta(hours=25)
"""Marks so far ahead are of a clock that was wrong; no change of summer time moves it as far."""
_BACK = (timedelta(hours=1), timedelta(days=1), timedelta(days=31), timedelta(days=366), None)


@dataclass(frozen=True)
class Due:
    """What a look at the clock found."""

    times: tuple[datetime, ...]
    """To be run."""
    mark: datetime
    """The time after which the next look begins."""
    next: datetime | None
    """When to look again."""
    note: str = ""


def due(trigger: Trigger, mark: datetime | None, now: datetime, zone: tzinfo) -> Due:
    """Return the times that are due. ``mark``: of the last look, None at the very first; ``zone``: that of cron."""
    if mark is None:
        return Due((), now, _after(trigger, now, zone))
    # An interval that waited for a clock to come back would wait too long.
    if mark > (now if trigger.every is not None else now + _WRONG):
        return Due((), now, _after(trigger, now, zone), "the clock was set back; the schedule begins anew")
    times, all_of_them = _between(trigger, mark, now, zone)
    kept = _kept(trigger, times, now)
    note = "" if all_of_them and len(kept) == len(times) else "missed times were left out"
    last = max([mark, *times])
    return Due(tuple(kept), last, _after(trigger, last, zone), note)


def _between(trigger: Trigger, mark: datetime, now: datetime, zone: tzinfo) -> tuple[list[datetime], bool]:
    """Return the last times that were due since the mark, and whether these are all.

    It looks back farther and farther until it has as many as are ever taken up: years of every minute are no work.
    """
    times: list[datetime] = []
    for back in _BACK:
        start = max(mark, now - back) if back else mark
        times, at = [], _first(trigger, mark, start, zone)
        while at is not None and at <= now:
            times.append(at)
            at = _after(trigger, at, zone)
        if start == mark or len(times) >= MOST:
            return times[-MOST:], start == mark and len(times) <= MOST
    return times, True


def _kept(trigger: Trigger, times: list[datetime], now: datetime) -> list[datetime]:
    missed = [at for at in times if at < now - LATE]
    if trigger.missed == "all" or not missed:
        return times
    in_time = [at for at in times if at >= now - LATE]
    if trigger.missed == "skip":
        return in_time
    return in_time or missed[-1:]


def _first(trigger: Trigger, mark: datetime, start: datetime, zone: tzinfo) -> datetime | None:
    """Return the first time after ``start``; of an interval, a whole number of steps after the mark."""
    if trigger.every is None:
        return _after(trigger, start, zone)
    step = timedelta(seconds=duration_s(trigger.every))
    return mark + ((start - mark) // step + 1) * step


def _after(trigger: Trigger, at: datetime, zone: tzinfo) -> datetime | None:
    """Return the first time of a schedule after another."""
    if trigger.every is not None:
        return at + timedelta(seconds=duration_s(trigger.every))
    assert trigger.cron is not None
    there = at.astimezone(zone)
    found: datetime | None = _made(trigger.cron, zone).get_next_fire_time(there, there)
    return None if found is None else found.astimezone(timezone.utc)


@functools.lru_cache(maxsize=256)
def _made(cron: str, zone: tzinfo) -> Any:
    return CronTrigger.from_crontab(cron, timezone=zone)
