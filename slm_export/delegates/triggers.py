"""What sets a delegate off, as delegates.toml says it; and the tables and durations that the file is made of."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
Text = Annotated[str, Field(min_length=1)]


def duration_s(text: str) -> float:
    """Return the seconds of ``90s``, ``10m``, ``1.5h`` or ``2d``; ValueError for anything else."""
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if seconds < 1:
        raise ValueError(f"{text!r} is no duration of a second or more; write 90s, 10m, 1.5h or 2d")
    return seconds


def _cron(text: str) -> str:
    from apscheduler.triggers.cron import CronTrigger

    try:
        CronTrigger.from_crontab(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{text!r} is no cron expression of five fields: {error}") from None
    if any(character.isdigit() for character in text.split()[4]):
        # cron counts from Sunday and APScheduler from Monday
        raise ValueError(f"{text!r}: write days of the week as names, mon to sun")
    return text


def _duration(text: str) -> str:
    duration_s(text)
    return text


Duration = Annotated[str, AfterValidator(_duration)]


class Table(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


def exactly_one(table: BaseModel, names: tuple[str, ...]) -> None:
    """Raise ValueError unless one of some fields is given."""
    given = [name for name in names if getattr(table, name) not in (None, False)]
    if len(given) != 1:
        raise ValueError(f"needs exactly one of {', '.join(names)}; it has {', '.join(given) or 'none'}")


class Trigger(Table):
    """What sets a delegate off; exactly one of the first five."""

    cron: Annotated[str, AfterValidator(_cron)] | None = None
    """Five fields, in the machine's time zone."""
    every: Duration | None = None
    watch: Text | None = None
    """A file, or a folder whose files are looked at."""
    webhook: bool = False
    """``POST /delegates/NAME``."""
    stdin: bool = False
    """Every line of standard input."""
    match: Text = "*"
    """Of a watched folder: files of such names."""
    existing: bool = False
    """Whether files count that were there before the delegate's first run."""
    read: Text | None = None
    """Of a schedule: a file whose text is the input."""
    missed: Literal["once", "all", "skip"] = "once"
    """Of a schedule: what becomes of times at which nothing ran."""
    overlap: Literal["queue", "skip"] = "queue"
    """Of a schedule: what becomes of a time at which the one before is still at work."""

    @model_validator(mode="after")
    def _one_kind(self) -> Trigger:
        exactly_one(self, ("cron", "every", "watch", "webhook", "stdin"))
        of_schedules = {"read", "missed", "overlap"} & self.model_fields_set
        if of_schedules and not self.scheduled:
            raise ValueError(f"{sorted(of_schedules)[0]} is of use with cron and every alone")
        if {"match", "existing"} & self.model_fields_set and self.watch is None:
            raise ValueError("match and existing are of use with watch alone")
        return self

    @property
    def scheduled(self) -> bool:
        """Whether time sets it off."""
        return self.cron is not None or self.every is not None

    def __str__(self) -> str:
        """Return it in words."""
        if self.watch is not None:
            return f"watch {self.watch}"
        if self.scheduled:
            return f"cron {self.cron}" if self.cron else f"every {self.every}"
        return "webhook" if self.webhook else "stdin"
