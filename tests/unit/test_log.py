"""Log lines: one record is one line, for people and for machines."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from stillpoint import log

HOSTILE = "a\nb\x1b[2J\u202e\r\ud800"


@pytest.fixture(autouse=True)
def root_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in (log.LEVEL_VARIABLE, log.FORMAT_VARIABLE, "STILLPOINT_LOG_NODE"):
        monkeypatch.setenv(variable, "")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


Lines = Callable[[], list[str]]


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Lines:
    return lambda: capfd.readouterr().err.splitlines()


def test_a_json_line_has_the_node_and_every_field(lines: Lines) -> None:
    log.configure("primary", node="a1", form="json")
    logging.getLogger("stillpoint.x").warning("gone: %s", "why", extra={"volume": "vol1", "epoch": 3})
    (line,) = lines()
    document = json.loads(line)
    assert document.pop("time") > 1e9
    assert document == {
        "level": "warning",
        "process": "primary",
        "node": "a1",
        "logger": "stillpoint.x",
        "message": "gone: why",
        "volume": "vol1",
        "epoch": 3,
    }


def test_a_field_cannot_pass_for_one_of_ours(lines: Lines) -> None:
    log.configure("primary", node="a1", form="json")
    logging.getLogger("x").info("hello", extra={"node": "other", "level": "debug"})
    document = json.loads(lines()[0])
    assert (document["node"], document["level"]) == ("a1", "info")


@pytest.mark.parametrize("form", log.FORMATS)
def test_what_a_peer_put_into_a_name_never_breaks_a_line(lines: Lines, form: str) -> None:
    log.configure("primary", form=form)
    logging.getLogger("x").info("no volume %s", HOSTILE, extra={"peer": HOSTILE})
    (line,) = lines()
    assert line.isascii() and line.isprintable()


def test_fields_for_people_can_be_told_apart(lines: Lines) -> None:
    log.configure("standby", node="b1")
    logging.getLogger("x").info("hello", extra={"volume": "vol1", "reason": "a b=c", "size": 5})
    (line,) = lines()
    assert line.endswith('info    standby b1: hello volume=vol1 reason="a b=c" size=5')


def test_the_environment_decides_where_nothing_is_given(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.LEVEL_VARIABLE, "warning")
    monkeypatch.setenv(log.FORMAT_VARIABLE, "json")
    log.configure("export")
    logging.getLogger("x").info("left out")
    logging.getLogger("x").warning("kept")
    assert [json.loads(line)["message"] for line in lines()] == ["kept"]


def test_what_was_given_is_handed_to_processes_that_are_started() -> None:
    log.configure("standby", node="b1", level="error", form="json")
    code = "import os; from stillpoint import log; log.configure('export'); log.logging.error('x')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    document = json.loads(child.stderr)
    assert (document["process"], document["node"], document["message"]) == ("export", "b1", "x")
