"""Tables, times and progress as text."""

import io

import pytest

from stillpoint.cli.output import (
    PlainProgress,
    format_age,
    format_rate,
    format_seconds,
    iso_time,
    plain_table,
    plural,
    progress_line,
)

SECOND = 1_000_000_000


def test_plain_table_aligns_columns_and_never_cuts() -> None:
    long_name = "a-name-much-longer-than-any-terminal-is-wide" * 3
    text = plain_table(("VOLUME", "SIZE>", "PAIR"), [("a", "1 KiB", "in sync"), (long_name, "10 GiB", "")])
    header, first, second = text.splitlines()
    assert header.split() == ["VOLUME", "SIZE", "PAIR"]
    assert second == f"{long_name}  10 GiB  -"
    assert first.index("in sync") == header.index("PAIR") == second.index("-", len(long_name))
    assert first == first.rstrip()


def test_empty_cells_show_as_a_dash() -> None:
    assert plain_table(("A", "B"), [("", "x")]).splitlines()[1] == "-  x"


@pytest.mark.parametrize(
    ("seconds_ago", "shown"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (3 * 3600, "3h"), (47 * 3600, "47h"), (8 * 86400, "8d"), (-5, "0s")],
)
def test_age_has_one_unit(seconds_ago: int, shown: str) -> None:
    now_ns = 1_800_000_000 * SECOND
    assert format_age(now_ns - seconds_ago * SECOND, now_ns=now_ns) == shown


def test_age_and_time_of_never() -> None:
    assert format_age(0) == "-"
    assert iso_time(0) is None


def test_times_are_iso_8601_in_utc_to_the_microsecond() -> None:
    assert iso_time(1_700_000_000 * SECOND + 123_456_789) == "2023-11-14T22:13:20.123456Z"
    assert iso_time(1_700_000_000 * SECOND) == "2023-11-14T22:13:20Z"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0008, "0.8 ms"), (0.25, "250.0 ms"), (3.21, "3.2 s"), (250, "4 min 10 s"), (3 * 3600 + 59, "3 h 0 min")],
)
def test_durations_for_people(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


def test_rate_without_time_is_unknown() -> None:
    assert format_rate(1024, 0) == "-"
    assert format_rate(3 * 1024**2, 2) == "1.5 MiB/s"


def test_progress_line_has_share_rate_and_time_left() -> None:
    line = progress_line("restoring", 64 * 1024**2, 256 * 1024**2, elapsed_s=2, finished=False)
    assert line == "restoring: 64 MiB of 256 MiB (25%), 32 MiB/s, 6.0 s left"


def test_progress_line_at_the_start_divides_by_nothing() -> None:
    assert progress_line("restoring", 0, 0, elapsed_s=0, finished=False) == "restoring: 0 B"


def test_a_count_of_one_is_singular() -> None:
    assert [plural(count, "backup") for count in (0, 1, 2)] == ["0 backups", "1 backup", "2 backups"]


def test_progress_in_a_pipe_is_one_line_when_the_job_is_short() -> None:
    stream = io.StringIO()
    progress = PlainProgress("verifying", 1024, stream)
    for done in range(0, 1025, 8):
        progress.update(done, 1024)
    progress.finish()
    assert len(stream.getvalue().splitlines()) == 1
    assert stream.getvalue().startswith("verifying: 1 KiB")
