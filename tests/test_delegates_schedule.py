"""When schedules are due: missed times, summer time, clocks that are set."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_export.delegates.schedule import LATE, MOST, Due, due
from slm_export.delegates.triggers import Trigger

UTC = timezone.utc
BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
MATCHES: dict[str, Callable[[datetime], bool]] = {
    "*/7 * * * *": lambda at: at.minute % 7 == 0,
    "0 */3 * * *": lambda at: at.minute == 0 and at.hour % 3 == 0,
    "5,17 9-17 * * *": lambda at: at.minute in (5, 17) and 9 <= at.hour <= 17,
}
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def look(mark: datetime | None, now: datetime, zone: Any = UTC, **trigger: Any) -> Due:
    return due(Trigger(**trigger), mark, now, zone)


def test_nothing_is_due_at_the_first_look() -> None:
    found = look(None, NOON, every="10m")
    assert (found.times, found.mark, found.next) == ((), NOON, NOON + 10 * MINUTE)
    found = look(None, NOON, cron="30 * * * *")
    assert (found.times, found.mark, found.next) == ((), NOON, NOON + 30 * MINUTE)


@pytest.mark.parametrize("trigger", [{"every": "10m"}, {"cron": "*/10 * * * *"}])
def test_a_time_is_due_once(trigger: dict[str, str]) -> None:
    mark, seen = NOON, []
    for minute in range(61):
        found = look(mark, NOON + minute * MINUTE, **trigger)
        seen += found.times
        mark = found.mark
        assert found.next is not None
        assert found.next > NOON + minute * MINUTE
    assert seen == [NOON + n * 10 * MINUTE for n in range(1, 7)]


@pytest.mark.parametrize(("missed", "expected"), [("once", [6]), ("all", [1, 2, 3, 4, 5, 6]), ("skip", [])])
def test_missed_times_are_taken_up_as_is_said(missed: str, expected: list[int]) -> None:
    found = look(NOON, NOON + 6 * HOUR + 5 * MINUTE, every="1h", missed=missed)
    assert [(at - NOON) / HOUR for at in found.times] == expected
    assert found.mark == NOON + 6 * HOUR
    assert found.next == NOON + 7 * HOUR
    assert bool(found.note) == (missed != "all")


@pytest.mark.parametrize("missed", ["once", "all", "skip"])
def test_a_time_of_just_now_is_not_missed(missed: str) -> None:
    found = look(NOON, NOON + HOUR + LATE / 2, every="1h", missed=missed)
    assert found.times == (NOON + HOUR,)
    assert not found.note


def test_a_clock_that_is_set_back_repeats_no_time_of_cron() -> None:
    found = look(NOON + HOUR, NOON + MINUTE, cron="0 * * * *")
    assert found.times == ()
    assert found.mark == NOON + HOUR
    assert found.next == NOON + 2 * HOUR


def test_an_interval_does_not_wait_for_the_clock_to_come_back() -> None:
    found = look(NOON + HOUR, NOON, every="10m")
    assert (found.times, found.mark, found.next) == ((), NOON, NOON + 10 * MINUTE)
    assert "set back" in found.note


def test_a_clock_that_was_years_ahead_does_not_silence_a_schedule() -> None:
    found = look(NOON.replace(year=2035), NOON, cron="0 * * * *")
    assert (found.times, found.mark, found.next) == ((), NOON, NOON + HOUR)
    assert "set back" in found.note


@pytest.mark.parametrize("trigger", [{"every": "1s"}, {"cron": "* * * * *"}])
def test_years_of_standstill_are_a_bounded_number_of_times(trigger: dict[str, str]) -> None:
    now = NOON.replace(year=2046)
    found = look(NOON, now, missed="all", **trigger)
    assert len(found.times) == MOST
    assert found.mark == now
    assert "left out" in found.note


def test_a_yearly_time_is_found_after_years() -> None:
    now = NOON.replace(year=2046)
    found = look(NOON, now, cron="0 0 24 12 *")
    assert found.times == (datetime(2045, 12, 24, tzinfo=UTC),)


def test_cron_is_of_the_zone_and_follows_summer_time() -> None:
    # 29 March 2026 has 23 hours there, and 25 October 25.
    mark, days = datetime(2026, 3, 26, 12, tzinfo=UTC), []
    for hour in range(0, 24 * 230, 8):
        now = datetime(2026, 3, 26, 12, tzinfo=UTC) + hour * HOUR
        found = look(mark, now, BERLIN, cron="0 7 * * *", missed="all")
        days += [at.astimezone(BERLIN) for at in found.times]
        mark = found.mark
    assert {at.hour for at in days} == {7}
    dates = [at.date() for at in days]
    assert dates == [dates[0] + n * DAY for n in range(len(dates))]
    assert len(dates) > 225


def test_an_hour_that_comes_twice_runs_every_minute_of_it_once() -> None:
    start = datetime(2026, 10, 24, 23, tzinfo=UTC)
    mark, times = start, []
    for minute in range(0, 300, 5):
        found = look(mark, start + minute * MINUTE, BERLIN, cron="*/15 * * * *", missed="all")
        times += found.times
        mark = found.mark
    assert len(times) == len(set(times))
    assert times == sorted(times)


@given(
    steps=st.lists(st.integers(min_value=1, max_value=400), min_size=1, max_size=20),
    cron=st.sampled_from(list(MATCHES)),
)
@settings(max_examples=25)
def test_however_the_looks_fall_every_time_is_seen_once(steps: list[int], cron: str) -> None:
    mark, now, seen = NOON, NOON, []
    for step in steps:
        now += step * MINUTE
        found = look(mark, now, cron=cron, missed="all")
        seen += found.times
        mark = found.mark
    minutes = [NOON + n * MINUTE for n in range(1, sum(steps) + 1)]
    assert seen == [at for at in minutes if MATCHES[cron](at)]
