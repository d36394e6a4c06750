"""Structured logs on stderr: for people, or one JSON object a line.

Write `log.info("mirror in sync", extra={"volume": name})`; the fields land behind the message. Fields that appear in
many lines have one name everywhere: `volume`, `peer` (an address), `identity` (of its certificate), `epoch`, `session`.

Invariants
- A record is one line, whatever a peer put into a name: control characters are shown, never written. Only the traceback
  of a bug takes further lines, and only for people.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from typing import Final

LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("human", "json")
LEVEL_VARIABLE: Final = "STILLPOINT_LOG_LEVEL"
FORMAT_VARIABLE: Final = "STILLPOINT_LOG_FORMAT"
_NODE_VARIABLE: Final = "STILLPOINT_LOG_NODE"

# What a LogRecord has of its own; the rest of its attributes are fields given with `extra`.
_OWN = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}
# Those that end lines, move the cursor of a terminal, or turn the direction of the text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN = re.compile(r"[^\s\"'=]+")


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in record.__dict__.items() if key not in _OWN}


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _field(value: object) -> str:
    """As one word, so that the next field can be told from it."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) and not _CONTROL.search(text) else json.dumps(text)


class _Human(logging.Formatter):
    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {key}={_field(value)}" for key, value in _fields(record).items())
        message = _visible(record.getMessage())
        line = f"{stamp}.{int(record.msecs):03d} {record.levelname.lower():7} {self._who}: {message}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def __init__(self, process: str, node: str) -> None:
        super().__init__()
        self._process = process
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "process": self._process,
            "node": self._node,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # A field cannot pass for one of ours.
        document |= {key: value for key, value in _fields(record).items() if key not in document}
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def configure(process: str, *, node: str = "", level: str = "", form: str = "") -> None:
    """Send every log line of this process to stderr.

    process: primary, standby, export or backup. node: its configured name. What is not given is taken from the
    environment; processes that this one starts do as it does.
    """
    level = _chosen(level, LEVEL_VARIABLE, LEVELS, "info")
    form = _chosen(form, FORMAT_VARIABLE, FORMATS, "human")
    node = node or os.environ.get(_NODE_VARIABLE, "")
    os.environ |= {LEVEL_VARIABLE: level, FORMAT_VARIABLE: form, _NODE_VARIABLE: node}
    who = process if node in ("", process) else f"{process} {node}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process, node or process) if form == "json" else _Human(who))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _chosen(given: str, variable: str, known: tuple[str, ...], default: str) -> str:
    """A wrong word in the environment is no reason to be silent, nor to stop."""
    wanted = given or os.environ.get(variable, "").lower()
    return wanted if wanted in known else default
