"""What is known of schedules across restarts: one JSON document, `schedules.json` in the state directory.

Invariants:
- A run is noted before it begins and after it ends, durably, so a crash leads to one more run and never to one less.
- A document that is damaged is put aside as `schedules.json.damaged`; the schedules then begin anew: nothing is due at
  once, and the next time is.

Format: {"version": 1, "schedules": {NAME: the fields of ScheduleState}}. States of schedules that are no longer
configured are dropped.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from stillpoint.document import read_document, write_document
from stillpoint.errors import DataCorrupt, NotFound

from .schedule import ScheduleState

logger = logging.getLogger(__name__)

_VERSION: Final = 1


class ScheduleStore:
    def __init__(self, path: Path, labels: Iterable[str], *, now_ns: int) -> None:
        """A schedule that is new begins at `now_ns`; a run that was interrupted counts as failed."""
        self._path = path
        found = self._load()
        self._states: dict[str, ScheduleState] = {}
        for label in labels:
            state = found.get(label) or ScheduleState(handled_ns=now_ns)
            if state.running:
                state = state.failed(now_ns, "the backup node stopped in the middle of it")
            self._states[label] = state

    def get(self, label: str) -> ScheduleState:
        return self._states[label]

    def put(self, label: str, state: ScheduleState) -> None:
        """Durable on return. Raises DeviceError; the state then counts in this process nevertheless."""
        self._states[label] = state
        document = {name: asdict(each) for name, each in self._states.items()}
        write_document(self._path, {"version": _VERSION, "schedules": document})

    def _load(self) -> dict[str, ScheduleState]:
        try:
            document = read_document(self._path)
            if document.get("version") != _VERSION:
                raise DataCorrupt(f"{self._path} is of version {document.get('version')!r}")
            schedules: dict[str, Any] = document["schedules"]
            return {label: _state(fields) for label, fields in schedules.items()}
        except NotFound:
            return {}
        except (DataCorrupt, KeyError, TypeError, AttributeError) as error:
            aside = self._path.with_name(self._path.name + ".damaged")
            logger.error("what was known of the schedules is lost: %s; kept as %s", error, aside)
            with contextlib.suppress(OSError):
                self._path.rename(aside)
            return {}


def _state(fields: dict[str, Any]) -> ScheduleState:
    state = ScheduleState(**fields)
    for name, value in asdict(state).items():
        if type(value) is not type(getattr(_EXAMPLE, name)):
            raise DataCorrupt(f"{name} is {value!r}")
    return state


_EXAMPLE: Final = ScheduleState(handled_ns=0)
