"""What standbyctl shows: one JSON document or plain tables on stdout, progress and remarks on stderr.

Tables are coloured and fitted to the screen on a terminal. In a pipe they are plain columns, never cut, so that other
tools can read them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..config import format_size

# In a pipe or a log, one line of progress at most this often.
PLAIN_PROGRESS_INTERVAL_S = 5.0

# The words of a table that an operator must not overlook, and those that say all is well.
_BAD_WORDS = frozenset({"DISCONNECTED", "INVALID", "FAILED", "DOWN"})
_BUSY_WORDS = frozenset({"SYNCING", "CREATING"})
_GOOD_WORDS = frozenset({"in sync", "active", "up", "PASSED"})


class ProgressBar(Protocol):
    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        """`done_bytes` so far; the total when it was not known at the start."""


class Output:
    """Where one run of standbyctl writes. `as_json` may still be set while the command line is read."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    @property
    def plain(self) -> bool:
        return not sys.stdout.isatty()

    def document(self, document: object) -> None:
        """The one JSON document of a run with --json."""
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def line(self, text: str = "") -> None:
        sys.stdout.write(text + "\n")

    def alarm(self, text: str) -> None:
        """Part of the result that an operator must not overlook."""
        if self.plain:
            self.line(f"!! {text}")
        else:
            Console(highlight=False).print(Text(f"!! {text}", style="bold red"))

    def remark(self, text: str) -> None:
        """Something worth knowing that is not the result."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str = "") -> None:
        """`rows` under `columns`; `empty` instead when there are none. A column whose name ends in '>' is set right."""
        if not rows and empty:
            self.line(empty)
        elif self.plain:
            self.line(plain_table(columns, rows))
        else:
            Console(highlight=False).print(_rich_table(columns, rows))

    def properties(self, pairs: Sequence[tuple[str, str]]) -> None:
        """One thing, a property a line."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.line(f"{name.ljust(width)}  {value}".rstrip())

    @contextmanager
    def progress(self, title: str, total_bytes: int | None = None) -> Iterator[ProgressBar]:
        """A bar with rate and time left on a terminal; in a pipe a line now and then."""
        if not sys.stderr.isatty():
            plain = PlainProgress(title, total_bytes, sys.stderr)
            yield plain
            plain.finish()
            return
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            _RateColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            expand=False,
        ) as bars:
            yield _RichBar(bars, bars.add_task(title, total=total_bytes))


class _RateColumn(ProgressColumn):
    """The rate in the units of all other sizes here."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(f"{format_size(rate)}/s" if rate else "-", style="progress.data.speed")


class _RichBar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        if total_bytes:
            self._bars.update(self._task, completed=done_bytes, total=total_bytes)
        else:
            self._bars.update(self._task, completed=done_bytes)


class PlainProgress:
    """Progress as lines of text: at most one each few seconds, and the last one."""

    def __init__(self, title: str, total_bytes: int | None, stream: TextIO) -> None:
        self._title = title
        self._total_bytes = total_bytes or 0
        self._done_bytes = 0
        self._stream = stream
        self._started = self._shown = time.monotonic()

    def update(self, done_bytes: int, total_bytes: int | None = None) -> None:
        self._done_bytes = done_bytes
        self._total_bytes = total_bytes or self._total_bytes
        now = time.monotonic()
        if now - self._shown >= PLAIN_PROGRESS_INTERVAL_S:
            self._shown = now
            self._show(now - self._started, finished=False)

    def finish(self) -> None:
        self._show(time.monotonic() - self._started, finished=True)

    def _show(self, elapsed_s: float, *, finished: bool) -> None:
        self._stream.write(
            progress_line(self._title, self._done_bytes, self._total_bytes, elapsed_s=elapsed_s, finished=finished)
            + "\n"
        )
        self._stream.flush()


def progress_line(title: str, done_bytes: int, total_bytes: int, *, elapsed_s: float, finished: bool) -> str:
    """One line: how much, how fast, how long still."""
    rate = done_bytes / elapsed_s if elapsed_s > 0 else 0.0
    parts = [f"{title}: {format_size(done_bytes)}"]
    if total_bytes and not finished:
        parts[0] += f" of {format_size(total_bytes)} ({100 * done_bytes // total_bytes}%)"
    if rate:
        parts.append(f"{format_size(rate)}/s")
    if finished:
        parts.append(f"done in {format_seconds(elapsed_s)}")
    elif rate and total_bytes > done_bytes:
        parts.append(f"{format_seconds((total_bytes - done_bytes) / rate)} left")
    return ", ".join(parts)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two blanks apart, nothing cut, no trailing blanks."""
    right = [name.endswith(">") for name in columns]
    lines = [[name.removesuffix(">") for name in columns], *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_the_right else cell.ljust(width)
            for cell, width, to_the_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        if name.endswith(">"):
            table.add_column(name.removesuffix(">"), justify="right", no_wrap=True)
        else:
            # Folded, not cut: half a name is of no use.
            table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell or "-", style=style_of(cell)) for cell in row))
    return table


def style_of(cell: str) -> str:
    if cell in _BAD_WORDS:
        return "bold red"
    if cell in _BUSY_WORDS:
        return "yellow"
    return "green" if cell in _GOOD_WORDS else ""


def iso_time(ns: int) -> str | None:
    """Nanoseconds since the epoch as ISO 8601 in UTC, to the microsecond; None for 0, which means never."""
    if not ns:
        return None
    whole, rest = divmod(ns, 1_000_000_000)
    return datetime.fromtimestamp(whole, UTC).replace(microsecond=rest // 1000).isoformat().replace("+00:00", "Z")


def format_age(ns: int, *, now_ns: int | None = None) -> str:
    """How long ago, in one unit: "12s", "5m", "3h", "8d"; "-" for never."""
    if not ns:
        return "-"
    seconds = max(0, (time.time_ns() if now_ns is None else now_ns) - ns) // 1_000_000_000
    for unit, length, limit in (("s", 1, 120), ("m", 60, 120 * 60), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{seconds // length}{unit}"
    return f"{seconds // 86400}d"


def format_in(ns: int, *, now_ns: int | None = None) -> str:
    """How long until, as `format_age`; "now" when it is past, "-" for never."""
    now_ns = time.time_ns() if now_ns is None else now_ns
    if not ns or ns > now_ns:
        return format_age(2 * now_ns - ns if ns else 0, now_ns=now_ns)
    return "now"


def format_seconds(seconds: float) -> str:
    """A duration for people: "0.8 ms", "3.2 s", "4 min 10 s"."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_rate(total_bytes: int, seconds: float) -> str:
    return f"{format_size(total_bytes / seconds)}/s" if seconds > 0 else "-"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def enum_word(name: str, prefix: str) -> str:
    """The JSON word of a generated enum's member: PAIR_STATE_IN_SYNC without PAIR_STATE_ is "in_sync"."""
    return name.removeprefix(prefix).lower()
