"""The promise of a target: where an image is written to."""

from __future__ import annotations

from typing import Protocol

from ..devices import Buffer


class Target(Protocol):
    """Takes the image's bytes. One call at a time. Ranges in ascending order; what is never given is undefined.

    Ends with `finish` or `abort`, once; after an error or a cancelled call only `abort` makes sense.
    """

    @property
    def description(self) -> str:
        """What an operator calls it."""
        ...

    @property
    def written_bytes(self) -> int:
        """Of data, so far; zeroes are not counted."""
        ...

    @property
    def starts_as_zeroes(self) -> bool:
        """Whether every byte that was not written reads as zero."""
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """What is there, of what was written too. Raises DeviceError."""
        ...

    async def flush(self) -> None:
        """Make durable what was written, and read it from the disk from now on where that can be had.

        Raises DeviceError.
        """
        ...

    async def write(self, offset: int, data: Buffer) -> None:
        """The buffer must not change any more: the target may still need it. Raises DeviceError, of this or an
        earlier call.
        """
        ...

    async def zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, without writing them where that can be avoided. Raises DeviceError."""
        ...

    async def finish(self) -> None:
        """Complete it: durable on return. Raises DeviceError; it is then incomplete, and does not look complete."""
        ...

    async def abort(self) -> None:
        """Give up: remove the incomplete file, or leave the device without its beginning. Raises nothing."""
        ...
