"""Structured logs on stderr: for people, or one JSON object a line.

Write `log.info("mirror in sync", extra={"volume": name})`; the fields land behind the message.
"""

from __future__ import annotations

import json
import logging
import sys
import time

# What a LogRecord has of its own; the rest of its attributes are fields given with `extra`.
_OWN = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in record.__dict__.items() if key not in _OWN}


class _Human(logging.Formatter):
    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {key}={value}" for key, value in _fields(record).items())
        line = (
            f"{stamp}.{int(record.msecs):03d} {record.levelname.lower():7} {self._node}: {record.getMessage()}{fields}"
        )
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "node": self._node,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def configure(node: str, *, level: str = "info", as_json: bool = False) -> None:
    """Send every log line of this process to stderr, marked with the node's name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(node) if as_json else _Human(node))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
