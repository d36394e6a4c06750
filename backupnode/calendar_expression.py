"""When a schedule is due: a subset of systemd's calendar expressions. Pure: no clock is read.

    [WEEKDAYS] [[YEAR-]MONTH-DAY] [HOUR:MINUTE[:SECOND]] [ZONE]        "Mon..Fri 02:30", "*-*-1 04:00 Europe/Berlin"
    minutely | hourly | daily | weekly | monthly | quarterly | yearly [ZONE]

A field is `*` or a list of `N`, `A..B`, each with `/STEP` behind it if wanted (`0/15`: 0, 15, 30, 45). A second is one
number. What is left out is any date, and midnight. ZONE is a name of the time zone database; UTC without it.

When clocks are put forward, what falls into the hour that does not exist comes by that much later. When they are put
back, what falls into the hour that comes twice is due in the first, and in both if it is due in every hour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from stillpoint.errors import ConfigError

_SHORTHANDS: Final = {
    "minutely": "*:*",
    "hourly": "*:00",
    "daily": "00:00",
    "weekly": "Mon 00:00",
    "monthly": "*-*-1 00:00",
    "quarterly": "*-1,4,7,10-1 00:00",
    "yearly": "*-1-1 00:00",
}
_WEEKDAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_WEEKDAY_TOKEN: Final = re.compile(r"[A-Za-z]+(?:(?:\.\.|,)[A-Za-z]+)*")
_ITEM: Final = re.compile(r"(\*|\d+)(?:\.\.(\d+))?(?:/(\d+))?", re.ASCII)
_YEAR_MIN, _YEAR_MAX = 1970, 2199
# No rule needs longer to come again: 29 February on a given weekday needs 40 years when a century passes.
_HORIZON_YEARS: Final = 41
# The largest step of a clock that is looked behind and ahead.
_STEP: Final = timedelta(hours=3)


@dataclass(frozen=True, slots=True)
class CalendarExpression:
    """Made by `parse`. `text` is what it was made from."""

    text: str
    weekdays: frozenset[int]  # 0: Monday
    years: frozenset[int]
    months: frozenset[int]
    days: frozenset[int]
    hours: tuple[int, ...]
    minutes: tuple[int, ...]
    second: int
    zone: ZoneInfo

    def next_after(self, instant: datetime) -> datetime | None:
        """The first time it is due after `instant` (aware), in UTC. None: never in the next 40 years."""
        best: datetime | None = None
        stop: datetime | None = None
        start = instant.astimezone(self.zone).replace(tzinfo=None)
        # Around a step of the clock, the order of local times is not the order of instants.
        for local in self._local_times(start - _STEP):
            if stop is not None and local > stop:
                break
            for due in self._instants(local):
                if due > instant and (best is None or due < best):
                    best = due
                    stop = due.astimezone(self.zone).replace(tzinfo=None) + _STEP
        return best

    def _local_times(self, start: datetime) -> Iterator[datetime]:
        """Local times of the rule from `start` on, ascending."""
        for day in self._days(start.date()):
            for hour in self.hours:
                for minute in self.minutes:
                    local = datetime.combine(day, time(hour, minute, self.second))
                    if local >= start:
                        yield local

    def _days(self, first: date) -> Iterator[date]:
        day = first
        last_year = min(first.year + _HORIZON_YEARS, _YEAR_MAX)
        while day.year <= last_year:
            if day.year not in self.years or day.month not in self.months:
                # On to the first of the next month.
                day = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
                continue
            if day.day in self.days and day.weekday() in self.weekdays:
                yield day
            day += timedelta(days=1)

    def _instants(self, local: datetime) -> Iterator[datetime]:
        first = local.replace(tzinfo=self.zone, fold=0).astimezone(UTC)
        yield first
        if len(self.hours) == 24:
            # In a gap this is earlier than `first`, and no time of the rule.
            second = local.replace(tzinfo=self.zone, fold=1).astimezone(UTC)
            if second > first:
                yield second


def parse(text: str) -> CalendarExpression:
    """Raises ConfigError, saying what is wrong, also for a date that never comes."""
    try:
        expression = _parse(text)
    except ValueError as error:
        raise ConfigError(f"{text[:100]!r} is no calendar expression: {error}") from None
    if expression.next_after(datetime(_YEAR_MIN + 50, 1, 1, tzinfo=UTC)) is None:
        raise ConfigError(f"{text[:100]!r} is no calendar expression: there is no such date")
    return expression


def _parse(text: str) -> CalendarExpression:
    tokens = text.split()
    if not tokens:
        raise ValueError("it is empty")
    if tokens[0].lower() in _SHORTHANDS:
        if len(tokens) > 2:
            raise ValueError(f"{tokens[0]} takes a time zone at most")
        tokens[:1] = _SHORTHANDS[tokens[0].lower()].split()
    weekdays, dates, times, zone = frozenset(range(7)), "*-*-*", "00:00", ZoneInfo("UTC")
    if tokens and _is_weekdays(tokens[0]):
        weekdays = _weekdays(tokens.pop(0))
    if tokens and ":" not in tokens[0] and re.search(r"[\d*]-[\d*]", tokens[0]):
        dates = tokens.pop(0)
    if tokens and ":" in tokens[0]:
        times = tokens.pop(0)
    if tokens:
        zone = _zone(tokens.pop(0))
    if tokens:
        raise ValueError(f"{tokens[0]!r} is not expected there; the order is WEEKDAYS DATE TIME ZONE")
    date_fields, time_fields = dates.split("-"), times.split(":")
    if len(date_fields) == 2:
        date_fields.insert(0, "*")
    if len(time_fields) == 2:
        time_fields.append("0")
    if len(date_fields) != 3 or len(time_fields) != 3:
        raise ValueError("a date is YEAR-MONTH-DAY or MONTH-DAY, a time HOUR:MINUTE or HOUR:MINUTE:SECOND")
    second = _field(time_fields[2], 0, 59, "second")
    if len(second) != 1:
        raise ValueError("a second is one number")
    return CalendarExpression(
        text=text,
        weekdays=weekdays,
        years=frozenset(_field(date_fields[0], _YEAR_MIN, _YEAR_MAX, "year")),
        months=frozenset(_field(date_fields[1], 1, 12, "month")),
        days=frozenset(_field(date_fields[2], 1, 31, "day")),
        hours=_field(time_fields[0], 0, 23, "hour"),
        minutes=_field(time_fields[1], 0, 59, "minute"),
        second=second[0],
        zone=zone,
    )


def _field(text: str, low: int, high: int, what: str) -> tuple[int, ...]:
    values: set[int] = set()
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None or (match[1] == "*" and match[2]):
            raise ValueError(f"{item!r} is no {what}")
        step = int(match[3]) if match[3] else 1
        first = low if match[1] == "*" else int(match[1])
        last = int(match[2]) if match[2] else high if match[1] == "*" or match[3] else first
        if not low <= first <= last <= high or step == 0:
            raise ValueError(f"{item!r} is no {what}: it must lie between {low} and {high}, in order")
        values.update(range(first, last + 1, step))
    return tuple(sorted(values))


def _is_weekdays(token: str) -> bool:
    return bool(_WEEKDAY_TOKEN.fullmatch(token)) and _weekday(re.split(r"\.\.|,", token)[0]) is not None


def _weekdays(token: str) -> frozenset[int]:
    days: set[int] = set()
    for item in token.split(","):
        first, _, last = item.partition("..")
        start, end = _weekday(first), _weekday(last or first)
        if start is None or end is None or start > end:
            raise ValueError(f"{item!r} are no weekdays; Monday is the first")
        days.update(range(start, end + 1))
    return frozenset(days)


def _weekday(name: str) -> int | None:
    lowered = name.lower()
    return next((n for n, day in enumerate(_WEEKDAYS) if lowered in (day, day[:3])), None)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone") from None
