"""One writer at a time, where the storage has no locks: an object that its holder keeps renewing.

Invariants:
- The object is only ever changed by a put that names the version it replaces, so two that try at once do not both win.
- A holder that has not been able to renew it for `_HELD_S` takes itself for fenced, before anybody else may take it
  over: that needs `_ABANDONED_S` without a change, as seen by the one who wants it. No two clocks are compared, only
  the rates at which they run.
- An owner that finds its own lease was restarted (its state directory is locked), and takes it over at once.

Between the holder's last look at its clock and the arrival of a request that it then sends, it may still lose the
lease. Packs and manifests stand that: their names are hashes and random, and a commit looks again after the manifest
was made.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from stillpoint.errors import DataCorrupt, InUse, StillpointError

logger = logging.getLogger(__name__)

_RENEW_S: Final = 10.0
_HELD_S: Final = 30.0
_ABANDONED_S: Final = 45.0


class LeaseObject(Protocol):
    """The object as the storage keeps it. Plain calls that may wait; they raise DeviceError."""

    def load(self) -> tuple[bytes, str] | None:
        """Its bytes and version; None: there is none."""
        ...

    def store(self, data: bytes, *, replacing: str | None) -> str | None:
        """Its new version; None when another than `replacing` is there. replacing: None: it must not exist."""
        ...


class Lease:
    """`take` comes first. `check` before each change; it may be called from any thread."""

    def __init__(
        self,
        store: LeaseObject,
        what: str,
        owner: str,
        *,
        pace: float = 1.0,
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        """what: the repository's name, for messages. pace: of all times; tests run faster."""
        self._store = store
        self._what = what
        self._owner = owner
        self._pace = pace
        self._clock = clock
        self._version = ""
        self._renewed_s = 0.0
        self._lost = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_closed, name="lease", daemon=True)

    def take(self) -> None:
        """May wait for `_ABANDONED_S`. Raises InUse, DeviceError."""
        found = self._store.load()
        if found is not None and self._holder(found[0]) not in ("", self._owner):
            logger.warning("waiting whether %s still holds %s", self._holder(found[0]), self._what)
            self._wait_until_abandoned(found[1])
        started_s = self._clock()
        version = self._store.store(self._document(self._owner), replacing=None if found is None else found[1])
        if version is None:
            raise InUse(f"the repository {self._what} is in use by another node")
        self._version, self._renewed_s = version, started_s
        self._thread.start()

    def check(self) -> None:
        """Raises InUse when it is lost, or may be."""
        if self._lost or self._clock() - self._renewed_s > _HELD_S * self._pace:
            raise InUse(
                f"the repository {self._what} could not be kept for this node alone: it was taken over by another one,"
                " or could not be reached for too long"
            )

    def release(self) -> None:
        """Raises nothing."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        self._thread.join()
        if not self._lost:
            try:
                self._store.store(self._document(""), replacing=self._version)
            except StillpointError as error:
                logger.warning("the lease of %s cannot be given back: %s", self._what, error)

    def _wait_until_abandoned(self, version: str) -> None:
        until_s = self._clock() + _ABANDONED_S * self._pace
        while self._clock() < until_s:
            time.sleep(_RENEW_S / 4 * self._pace)
            found = self._store.load()
            if found is None or found[1] != version:
                raise InUse(f"the repository {self._what} is in use by another node")

    def _renew_until_closed(self) -> None:
        while not self._closing.wait(_RENEW_S * self._pace):
            started_s = self._clock()
            try:
                version = self._store.store(self._document(self._owner), replacing=self._version)
            except StillpointError as error:
                logger.warning("the lease of %s cannot be renewed: %s", self._what, error)
                continue
            if version is None:
                logger.error("the repository %s was taken over by another node", self._what)
                self._lost = True
                return
            self._version, self._renewed_s = version, started_s

    def _document(self, owner: str) -> bytes:
        # Different each time, as some storages make the version from the contents.
        return json.dumps({"owner": owner, "turn": secrets.token_hex(8)}).encode()

    def _holder(self, data: bytes) -> str:
        try:
            document: dict[str, Any] = json.loads(data)
            return str(document["owner"])
        except (ValueError, KeyError, TypeError):
            raise DataCorrupt(f"the lease of {self._what} makes no sense; delete the object `writer`") from None
