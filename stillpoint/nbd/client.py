"""An NBD client: many requests at once over one connection, within a bound of bytes in flight."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Final, Self

from ..devices import Buffer
from ..errors import PermissionRefused, ProtocolError, Refused
from ..extents import Extent, MappedExtent, check_range, split
from .client_connection import ClientConnection
from .client_session import ExportDescription
from .constants import AllocationFlag, Command, CommandFlag, ExportFlag
from .uri import NbdUri

BYTES_IN_FLIGHT_MAX: Final = 64 << 20
CONNECT_TIMEOUT_S: Final = 10.0

_STATUS_LENGTH_MAX: Final = 1 << 30
_ZEROES_LENGTH_MAX: Final = 1 << 30


class NbdClient:
    """A connection to one export. Make it with `connect`; its calls may be made concurrently.

    Errors: OutOfRange before anything is sent; DeviceError or PermissionRefused when the server says no;
    PeerUnavailable when the connection ends; ProtocolError when the server talks nonsense. All name the URI.
    """

    def __init__(self, connection: ClientConnection, uri: NbdUri, export: ExportDescription) -> None:
        self.uri = uri
        self.export = export
        self._connection = connection

    @classmethod
    async def connect(
        cls, uri: str, *, bytes_in_flight_max: int = BYTES_IN_FLIGHT_MAX, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Self:
        """Connect and negotiate. Raises InvalidRequest, NotFound, PeerUnavailable, ProtocolError, PermissionRefused.

        bytes_in_flight_max: further reads and writes wait until earlier ones are answered.
        """
        place = NbdUri.parse(uri)
        connection = ClientConnection(place, bytes_in_flight_max)
        return cls(connection, place, await connection.connect(timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def size(self) -> int:
        return self.export.size

    @property
    def read_only(self) -> bool:
        return self.export.can(ExportFlag.READ_ONLY)

    @property
    def description(self) -> str:
        return str(self.uri)

    # --- requests

    async def read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return data

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, which must stay alone until this returns; after an error or a cancellation it is rubbish."""

        async def read_piece(piece: Extent) -> None:
            start = piece.offset - offset
            target = buffer[start : start + piece.length]
            await self._connection.request(Command.READ, piece.offset, piece.length, target=target)

        await self._in_pieces(offset, len(buffer), self.export.request_max, read_piece)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write `data`, which must not change until this returns. Durable at `flush`, or on return with `fua`."""
        view = memoryview(data)

        async def write_piece(piece: Extent) -> None:
            start = piece.offset - offset
            payload = view[start : start + piece.length]
            await self._change(Command.WRITE, piece, fua=fua, payload=payload)

        await self._in_pieces(offset, len(view), self.export.request_max, write_piece)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Give the range back. The protocol does not promise zeroes afterwards; `write_zeroes` does."""
        self._demand(ExportFlag.SEND_TRIM, "trim")
        await self._in_pieces(
            offset, length, _ZEROES_LENGTH_MAX, lambda piece: self._change(Command.TRIM, piece, fua=fua)
        )

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False) -> None:
        self._demand(ExportFlag.SEND_WRITE_ZEROES, "zero")
        flags = CommandFlag(0) if may_trim else CommandFlag.NO_HOLE
        await self._in_pieces(
            offset,
            length,
            _ZEROES_LENGTH_MAX,
            lambda piece: self._change(Command.WRITE_ZEROES, piece, fua=fua, flags=flags),
        )

    async def flush(self) -> None:
        """Make every write that returned before this call durable."""
        if self.export.can(ExportFlag.SEND_FLUSH):
            await self._connection.request(Command.FLUSH, 0, 0)

    async def block_status(self, offset: int, length: int) -> list[MappedExtent]:
        """The range as data and holes, from `offset` to as far as the server cares to tell; at least one extent.

        A server that cannot tell says data.
        """
        check_range(offset=offset, length=length, size=self.size)
        length = min(length, _STATUS_LENGTH_MAX)
        if self.export.allocation_id is None or not length:
            return [MappedExtent(offset, length, hole=False)] if length else []
        extents = []
        end = offset + length
        for part, flags in await self._connection.request(Command.BLOCK_STATUS, offset, length):
            # The last one may reach beyond what was asked for.
            part = min(part, end - offset)
            if part <= 0:
                raise self._connection.abort(ProtocolError(f"{self.uri}: a block status with an empty extent"))
            extents.append(MappedExtent(offset, part, hole=bool(flags & AllocationFlag.ZERO)))
            offset += part
        return extents

    async def extents(self, offset: int, length: int) -> AsyncIterator[MappedExtent]:
        """The whole range as data and holes, in order and without gaps."""
        end = offset + length
        while offset < end:
            for extent in await self.block_status(offset, end - offset):
                yield extent
                offset = extent.end

    async def close(self) -> None:
        """Say goodbye and close. Flushes nothing."""
        await self._connection.close()

    async def _change(
        self, command: Command, piece: Extent, *, fua: bool, flags: int = 0, payload: memoryview | None = None
    ) -> None:
        if self.read_only:
            raise PermissionRefused(f"{self.uri}: is read-only")
        if fua and not self.export.can(ExportFlag.SEND_FUA):
            await self._connection.request(command, piece.offset, piece.length, flags=flags, payload=payload)
            await self.flush()
            return
        flags |= CommandFlag.FUA if fua else 0
        await self._connection.request(command, piece.offset, piece.length, flags=flags, payload=payload)

    def _demand(self, flag: ExportFlag, what: str) -> None:
        if not self.export.can(flag):
            raise Refused(f"{self.uri}: the server cannot {what}")

    async def _in_pieces(
        self, offset: int, length: int, limit: int, work: Callable[[Extent], Awaitable[object]]
    ) -> None:
        check_range(offset=offset, length=length, size=self.size)
        if not length:
            return
        for piece in split(Extent(offset, length), limit=limit):
            await work(piece)
