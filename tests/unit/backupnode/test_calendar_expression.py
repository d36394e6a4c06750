"""Calendar expressions against a model that looks at every minute, in zones whose clocks are put forward and back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from backupnode.calendar_expression import CalendarExpression, parse
from stillpoint.errors import ConfigError

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]
# Around the steps of the clocks of 2026, and an ordinary day.
STARTS = ["2026-03-28", "2026-10-24", "2026-03-07", "2026-10-31", "2026-04-04", "2026-10-03", "2026-06-10"]


def model(expression: CalendarExpression, start: datetime, end: datetime) -> Iterator[datetime]:
    """Every minute of the time line, and the local minutes that never come, shifted by what they are short of."""
    minute = start - timedelta(minutes=start.minute, seconds=start.second)
    while minute <= end:
        local = minute.astimezone(expression.zone)
        # What is on the clock 180 minutes back, if it does not exist there.
        for back in range(0, 181, 30):
            naive = local.replace(tzinfo=None) - timedelta(minutes=back)
            instant = naive.replace(tzinfo=expression.zone).astimezone(UTC)
            never_comes = instant.astimezone(expression.zone).replace(tzinfo=None) != naive
            if instant == minute and never_comes and _matches(expression, naive):
                yield minute
                break
        else:
            once = local.fold == 0 or len(expression.hours) == 24
            if once and _matches(expression, local.replace(tzinfo=None)):
                yield minute
        minute += timedelta(minutes=1)


def _matches(expression: CalendarExpression, local: datetime) -> bool:
    return (
        local.year in expression.years
        and local.month in expression.months
        and local.day in expression.days
        and local.weekday() in expression.weekdays
        and local.hour in expression.hours
        and local.minute in expression.minutes
    )


def some_expression(source: random.Random) -> str:
    weekdays = source.choice(["", "", "Mon..Fri ", "Sat,Sun ", "sunday "])
    dates = source.choice(["", "", "*-*-* ", "*-*-1..15 ", "3,10-* ", "*-*-25/3 "])
    hour = source.choice(["*", "2", "1..3", "0/2", "0/6", "2,3", "23"])
    minute = source.choice(["00", "30", "0/15", "5,59", "*/20"])
    return f"{weekdays}{dates}{hour}:{minute} {source.choice(ZONES)}"


@pytest.mark.parametrize("seed", range(20))
def test_the_next_time_is_the_one_that_a_look_at_every_minute_finds(seed: int) -> None:
    source = random.Random(seed)
    expression = parse(some_expression(source))
    start = datetime.fromisoformat(source.choice(STARTS)).replace(tzinfo=UTC) + timedelta(
        minutes=source.randrange(1440)
    )
    end = start + timedelta(days=2)
    expected = [each for each in model(expression, start, end) if start < each <= end]
    found = []
    at = expression.next_after(start)
    while at is not None and at <= end:
        found.append(at)
        at = expression.next_after(at)
    assert found == expected, expression.text
    # And from anywhere between them.
    for _ in range(20):
        between = start + timedelta(seconds=source.randrange(86400))
        assert expression.next_after(between) == next((each for each in expected if each > between), at)


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [
        ("daily", "2026-06-10T00:00", "2026-06-11T00:00"),
        ("hourly", "2026-06-10T00:59", "2026-06-10T01:00"),
        ("weekly Europe/Berlin", "2026-06-10T00:00", "2026-06-14T22:00"),
        ("monthly", "2026-12-31T23:59", "2027-01-01T00:00"),
        ("quarterly", "2026-01-01T00:00", "2026-04-01T00:00"),
        ("yearly", "2026-01-01T00:00", "2027-01-01T00:00"),
        ("2-29 12:00", "2026-01-01T00:00", "2028-02-29T12:00"),
        ("Mon 2-29", "2026-01-01T00:00", "2044-02-29T00:00"),
        ("Fri *-*-13 13:13:13", "2026-03-14T00:00", "2026-11-13T13:13:13"),
        ("2031-05-01 00:00", "2026-01-01T00:00", "2031-05-01T00:00"),
        # 02:30 does not exist on 29 March in Berlin, and comes twice on 25 October.
        ("02:30 Europe/Berlin", "2026-03-28T12:00", "2026-03-29T01:30"),
        ("02:30 Europe/Berlin", "2026-10-25T00:30", "2026-10-26T01:30"),
        ("*:30 Europe/Berlin", "2026-10-25T00:30", "2026-10-25T01:30"),
    ],
)
def test_known_dates(text: str, start: str, expected: str) -> None:
    at = datetime.fromisoformat(start).replace(tzinfo=UTC)
    assert parse(text).next_after(at) == datetime.fromisoformat(expected).replace(tzinfo=UTC)


def test_a_date_that_has_passed_is_never_due() -> None:
    assert parse("2021-05-01").next_after(datetime(2026, 1, 1, tzinfo=UTC)) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("Someday", "no time zone"),
        ("24:00", "between 0 and 23"),
        ("*:60", "between 0 and 59"),
        ("*:*:*", "a second is one number"),
        ("2-30", "there is no such date"),
        ("13-1", "between 1 and 12"),
        ("Fri..Mon", "no weekdays"),
        ("Mon,Foo 1:00", "no weekdays"),
        ("*:0/0", "no minute"),
        ("*:30..10", "no minute"),
        ("*..5:00", "no hour"),
        ("-1:00", "no hour"),
        ("1:00 Mars/Base", "no time zone"),
        ("1:00 ../../etc/passwd", "no time zone"),
        ("1:00 2026-01-01", "no time zone"),
        ("1:00 UTC x", "not expected"),
        ("daily 02:00 UTC", "a time zone at most"),
        ("1-2-3-4 1:00", "a date is"),
        ("1:2:3:4", "a date is"),
        ("٣:00", "no hour"),
    ],
)
def test_what_is_no_expression_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse(text)


def test_the_zone_is_the_one_named() -> None:
    assert parse("daily America/New_York").zone == ZoneInfo("America/New_York")
    assert parse("daily").zone == ZoneInfo("UTC")
