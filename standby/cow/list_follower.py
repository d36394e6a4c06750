"""The list of a volume's live snapshots as a reader of one of them follows it, and so the association maps to ask.

The list is in the shared header, guarded by its sequence: what was read while the sequence stayed the same is of one
state of the list.
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillpoint.errors import DeviceError, SnapshotInvalid

from .association import AssociationMap
from .association_forms import open_map
from .shared_header import HeaderState, SharedHeader
from .values import SnapshotState
from .volume import map_path

_PATIENCE_S: Final = 5.0  # for a list that keeps changing: the engine needs microseconds, unless it died in the middle
_STILL_READABLE: Final = frozenset({SnapshotState.CREATING, SnapshotState.ACTIVE, SnapshotState.LEAVING})


@dataclass(frozen=True, slots=True)
class View:
    """The maps that may hold blocks of the snapshot, oldest first, as of one state of the list.

    Never changed, so threads may share it.
    """

    sequence: int
    maps: dict[int, AssociationMap]


class ListFollower:
    """May be asked by several threads; `close` when none of them is in a call."""

    def __init__(self, header: Path, maps: Path, generation: int, *, name: str) -> None:
        """maps: the folder. generation, name: of the snapshot. Raises OSError."""
        self._header = SharedHeader.open(header)
        self._maps = maps
        self._generation = generation
        self._name = name
        self._view = View(-1, {})

    def view(self) -> View:
        """As of now. Raises SnapshotInvalid once the snapshot was deleted or lost blocks, or its engine has gone.

        Raises DeviceError when the engine died while it changed the list.
        """
        view = self._view
        if view.sequence == self._header.sequence and not self._header.closed:
            return view
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            if self._header.closed:
                raise SnapshotInvalid(f"{self._name}: its engine was stopped; open it again")
            state = self._header.read()
            if state is not None:
                self._check_state(state.states.get(self._generation))
                maps = self._open_maps(state)
                if maps is not None:
                    self._view = View(state.sequence, maps)
                    return self._view
            if time.monotonic() > deadline:
                raise DeviceError(f"{self._name}: the engine left its list of snapshots unfinished", errno.EIO)
            time.sleep(0.0002)

    def is_settled(self, view: View) -> bool:
        """Whether the list is still the one of the view, so that what was read by it counts."""
        return self._header.sequence == view.sequence and not self._header.closed

    def close(self) -> None:
        self._view = View(-1, {})
        self._header.close()

    def _check_state(self, state: SnapshotState | None) -> None:
        if state is None or state is SnapshotState.LEAVING:
            raise SnapshotInvalid(f"{self._name}: was deleted")
        if state is not SnapshotState.ACTIVE:
            raise SnapshotInvalid(f"{self._name}: is {state.name.lower()}")

    def _open_maps(self, state: HeaderState) -> dict[int, AssociationMap] | None:
        """None when one left meanwhile: ask again."""
        known = self._view.maps
        maps: dict[int, AssociationMap] = {}
        for generation in sorted(state.states):
            if generation >= self._generation and state.states[generation] in _STILL_READABLE:
                try:
                    maps[generation] = known.get(generation) or open_map(map_path(self._maps, generation))
                except FileNotFoundError:
                    return None
        return maps
