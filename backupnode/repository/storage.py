"""Where a repository keeps its objects: names with bytes, in a few flat folders.

What every storage promises (`tests/conformance/test_storages.py`):
- An object is absent or whole. It is durable, its name included, when the call that made it returns.
- `create` never replaces an object: this is what commits rest on.
- Plain calls that may wait and may come from several threads at once. They raise DeviceError when the storage fails.

A name is `FOLDER/NAME`, or `NAME` alone at the top. Names come from this package only: hashes, and ids that passed
`parse_backup_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .chunking import Piece


class Upload(Protocol):
    """One large object in the making. Calls come one at a time, except `write_back`."""

    def append(self, buffers: Sequence[Piece]) -> None: ...

    def finish(self, name: str) -> None:
        """Give it its name, in the place of an object that has it: names are hashes, so that one was no better.

        Durable on return.
        """
        ...

    def abort(self) -> None:
        """Throw it away. Raises nothing, and does nothing after `finish`."""
        ...


class Storage(Protocol):
    """Reading needs no preparation. Before the first change come `make`, `lock` and `prepare`, in this order."""

    @property
    def description(self) -> str:
        """What an operator calls it: its path or URL."""
        ...

    @property
    def requests_are_dear(self) -> bool:
        """Whether one large read is to be preferred to many small ones."""
        ...

    def make(self) -> bool:
        """Make room for a repository when there is none. Whether it is new: without the object `repository`.

        Raises Refused when something else is there, or when the storage cannot keep these promises.
        """
        ...

    def lock(self, owner: str) -> None:
        """Keep it for this process alone. owner: a name that no other running process has.

        May wait for a minute. Raises InUse. Where a storage cannot lock, later changes raise InUse when it was lost.
        """
        ...

    def prepare(self) -> None:
        """Remove what crashes left in the making."""
        ...

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted, without what is in the making."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Of what `names` tells."""
        ...

    def exists(self, name: str) -> bool: ...

    def forget_read(self) -> None:
        """Whoever has locked it may be given what it read before; from now on everything is read anew."""
        ...

    def read(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes, fewer at the end of the object; None: all. Raises NotFound."""
        ...

    def size(self, name: str) -> int:
        """Raises NotFound."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Raises AlreadyExists."""
        ...

    def replace(self, name: str, data: bytes) -> None: ...

    def delete(self, name: str) -> None:
        """Durable on return. Raises NotFound."""
        ...

    def upload(self, folder: str, *, name: str = "") -> Upload:
        """name: when it is known already. Without it, some storages have to keep everything in memory."""
        ...

    def total_bytes(self) -> int:
        """Of all objects."""
        ...

    def close(self) -> None:
        """Give the lock back. A second call does nothing."""
        ...
