"""The requests of one NBD connection: the hot path.

Every request that has arrived is handled in one go; `answers.py` sends the answers together.

Invariants
- A request is answered once, errors included; its answer follows everything it promises.
- Nothing of a write is applied before all of its payload is there.
- A length is checked before memory of that length is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from itertools import islice
from time import perf_counter
from typing import Final

from ..buffers import uninitialised
from ..channel import Channel
from ..errors import ProtocolError, StillpointError
from . import codec
from .answers import ARENA_SIZE, Answers, ChargedReplier, Pause
from .budget import Budget
from .constants import (
    CHUNK_FLAG_DONE,
    CHUNK_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    Errno,
)
from .errors import nbd_errno
from .export import Replier, run_in_thread
from .session import Agreement

# Reads up to this size are read into the arena; larger ones get a buffer of their own.
_ARENA_READ_SIZE: Final = 128 * 1024
# Reads above this size always go to a thread: even from memory they would keep the loop from others.
_INLINE_READ_SIZE: Final = 1 << 20
# Payloads from this size on are received into a buffer of their own unless they have arrived already.
_OWN_PAYLOAD_SIZE: Final = 64 * 1024
# Writes up to this size are not worth being counted in the budget: the number of requests in flight bounds them.
_FREE_WRITE_SIZE: Final = 8 * 1024
_STATUS_EXTENTS_MAX: Final = 2048

# Plain numbers: looking up an enum's member costs as much as the comparison, and the complement of an IntFlag holds
# only the flags it has names for.
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_FUA: Final = int(CommandFlag.FUA)
_DATA: Final = int(Chunk.OFFSET_DATA)
_REQUEST_SIZE: Final = codec.REQUEST.size

_unpack_request = codec.REQUEST.unpack_from
_pack_simple = codec.SIMPLE_REPLY.pack_into
_pack_chunk = codec.DATA_CHUNK.pack_into


class Transmission(Answers):
    """Serves one connection from the end of its handshake. `received`, `drained` and `ended` come from its channel."""

    def __init__(
        self, channel: Channel, agreement: Agreement, *, budget: Budget, executor: Executor, idle: Callable[[], None]
    ) -> None:
        """`idle` is called once, when the channel is closed and none of the requests runs any more."""
        super().__init__(channel, budget, agreement.export.traffic, idle)
        self._executor = executor
        self._export = agreement.export
        self._size = agreement.export.size
        self._request_max = agreement.export.maximum_request
        self._contexts = agreement.contexts
        self._status = agreement.status
        self._structured = agreement.structured
        self._header_size = codec.DATA_CHUNK.size if self._structured else codec.SIMPLE_REPLY.size
        self._read_flags = int(CommandFlag.FUA | CommandFlag.DF) if self._structured else _FUA
        channel.turn_ended = self._send
        self._alone = True
        self._began = 0.0  # when the batch in hand had arrived
        self._drain: tuple[int, int, int] | None = None  # payload bytes to drop, then cookie and errno to answer

    def received(self, data: memoryview) -> int:
        """Handle every complete request in `data`; returns the bytes consumed. Raises ProtocolError."""
        self._in_batch = True
        self._began = perf_counter()
        try:
            return self._take_requests(data)
        finally:
            self._end_batch()

    def _end_batch(self) -> None:
        self._export.end_batch()
        self._in_batch = False
        if self._alone or not self._channel.in_turn:
            self._send()
        # else at the end of the turn, together with the answers to what has arrived meanwhile

    def _take_requests(self, data: memoryview) -> int:
        position = 0 if self._drain is None else self._drain_payload(len(data))
        end = len(data)
        size = self._size
        header_size = self._header_size
        structured = self._structured
        view = self._arena_view
        try_read_into = self._export.try_read_into
        taken = 0
        read_count = read_size = 0
        while end - position >= _REQUEST_SIZE and not self._pauses:
            taken += 1
            magic, flags, command, cookie, offset, length = _unpack_request(data, position)
            if magic != REQUEST_MAGIC:
                raise ProtocolError("not a request")
            if command == _READ and 0 < length <= _ARENA_READ_SIZE and length <= size - offset and not flags:
                used = self._used
                answer_end = used + header_size + length
                if answer_end > ARENA_SIZE:
                    self._send()
                    continue
                position += _REQUEST_SIZE
                try:
                    if not try_read_into(offset, view[used + header_size : answer_end]):
                        self._read_apart(cookie, offset, length, charge=0)
                        continue
                except StillpointError as error:
                    self._refuse(command, cookie, nbd_errno(error))
                    continue
                if structured:
                    _pack_chunk(view, used, CHUNK_MAGIC, CHUNK_FLAG_DONE, _DATA, cookie, length + 8, offset)
                else:
                    _pack_simple(view, used, SIMPLE_REPLY_MAGIC, 0, cookie)
                self._used = answer_end
                read_count += 1
                read_size += length
            elif command == _WRITE:
                consumed = self._take_write(data, position, flags, cookie, offset, length)
                position += consumed
                if not consumed or self._receiving:
                    break
            elif command == _READ:
                if not self._take_read(flags, cookie, offset, length):
                    break
                position += _REQUEST_SIZE
            else:
                position += _REQUEST_SIZE
                self._take_other(command, flags, cookie, offset, length)
        # A client that asks one thing at a time waits for the answer: looking for more first would only delay it.
        self._alone = taken == 1
        if read_count:
            traffic = self._traffic
            traffic.read_count += read_count
            traffic.read_bytes += read_size
            traffic.read_latency.observe(perf_counter() - self._began, read_count)
        return end if self._pauses & Pause.ENDING else position

    # --- writes

    def _take_write(self, data: memoryview, position: int, flags: int, cookie: int, offset: int, length: int) -> int:
        """Handle the write at `position`; returns the bytes consumed, 0 when it cannot be handled yet."""
        start = position + _REQUEST_SIZE
        have = len(data) - start
        if length > self._request_max:
            raise ProtocolError(f"a write of {length} bytes")
        if not length or length > self._size - offset or flags & ~_FUA or self._export.read_only:
            return self._drop_write(have, flags, cookie, offset, length)
        if have < length:
            if length < _OWN_PAYLOAD_SIZE or not self._reserve(length):
                return 0
            self._receive_payload(flags, cookie, offset, length)
            return _REQUEST_SIZE
        replier: Replier = self
        if length > _FREE_WRITE_SIZE:
            if not self._reserve(length):
                return 0
            replier = ChargedReplier(self, length)
        self._write(offset, data[start : start + length], False, flags, replier, cookie)
        return _REQUEST_SIZE + length

    def _write(self, offset: int, payload: memoryview, owned: bool, flags: int, replier: Replier, cookie: int) -> None:
        self._begin()
        traffic = self._traffic
        traffic.write_count += 1
        traffic.written_bytes += len(payload)
        try:
            self._export.write(offset, payload, owned, flags == _FUA, replier, cookie)
        except StillpointError as error:
            replier.reply(cookie, nbd_errno(error))

    def _receive_payload(self, flags: int, cookie: int, offset: int, length: int) -> None:
        payload = uninitialised(length)
        self._receiving = length
        self._await_client()

        def complete() -> None:
            self._receiving = 0
            self._client_awaited_since = None
            self._in_batch = True
            try:
                self._write(offset, payload, True, flags, ChargedReplier(self, length), cookie)
            finally:
                self._end_batch()

        self._channel.fill(payload, complete)

    def _drop_write(self, have: int, flags: int, cookie: int, offset: int, length: int) -> int:
        """Answer a write that is not to be done, once its payload is out of the way; returns the bytes consumed."""
        if flags & ~_FUA:
            errno = Errno.EINVAL
        elif self._export.read_only:
            errno = Errno.EPERM
        elif length > self._size - offset:
            errno = Errno.ENOSPC
        else:
            errno = Errno.OK  # zero bytes: nothing to do
        if have >= length:
            self._refuse(_WRITE, cookie, errno)
            return _REQUEST_SIZE + length
        self._drain = (length - have, cookie, errno)
        return _REQUEST_SIZE + have

    def _drain_payload(self, have: int) -> int:
        assert self._drain is not None
        length, cookie, errno = self._drain
        if have < length:
            self._drain = (length - have, cookie, errno)
            return have
        self._drain = None
        self._refuse(_WRITE, cookie, errno)
        return length

    # --- reads that the loop over requests leaves aside: large, cold, empty, impossible or with flags

    def _take_read(self, flags: int, cookie: int, offset: int, length: int) -> bool:
        """Handle a read; False when there is no memory for it yet."""
        if flags & ~self._read_flags or length > self._size - offset or length > self._request_max:
            self._refuse(_READ, cookie, Errno.EINVAL)
        elif not length:
            self._begin()
            if self._structured:
                self._finish(codec.ChunkHeader(CHUNK_FLAG_DONE, Chunk.NONE, cookie, 0).encode())
            else:
                self.reply(cookie, 0)
        elif length <= _ARENA_READ_SIZE:
            self._read_apart(cookie, offset, length, charge=0)
        elif self._reserve(length):
            self._read_apart(cookie, offset, length, charge=length)
        else:
            return False
        return True

    def _read_apart(self, cookie: int, offset: int, length: int, *, charge: int) -> None:
        """Read into a buffer of its own. charge: how many bytes of budget were taken for it."""
        self._begin()
        traffic, began = self._traffic, self._began
        traffic.read_count += 1
        traffic.read_bytes += length
        answer = uninitialised(self._header_size + length)
        target = answer[self._header_size :]
        if length <= _INLINE_READ_SIZE:
            try:
                if self._export.try_read_into(offset, target):
                    traffic.read_latency.observe(perf_counter() - began)
                    self._finish_read(answer, charge, cookie, offset, None)
                    return
            except StillpointError as error:
                self._finish_read(answer, charge, cookie, offset, error)
                return

        def done(error: Exception | None) -> None:
            traffic.read_latency.observe(perf_counter() - began)
            self._finish_read(answer, charge, cookie, offset, error)

        run_in_thread(self._executor, lambda: self._export.read_into(offset, target), done)

    def _finish_read(self, answer: memoryview, charge: int, cookie: int, offset: int, error: Exception | None) -> None:
        if error is not None or self._ended:
            self.release(charge)
            self._answer_error(_READ, cookie, nbd_errno(error) if error is not None else Errno.EIO)
            return
        if self._structured:
            length = len(answer) - self._header_size + 8
            _pack_chunk(answer, 0, CHUNK_MAGIC, CHUNK_FLAG_DONE, _DATA, cookie, length, offset)
        else:
            _pack_simple(answer, 0, SIMPLE_REPLY_MAGIC, 0, cookie)
        self._sending += charge
        self._finish(answer)

    # --- everything else

    def _take_other(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        handler, allowed = _COMMANDS.get(command, _UNKNOWN)
        if handler is None or flags & ~allowed:
            self._refuse(command, cookie, Errno.EINVAL)
            return
        handler(self, flags, cookie, offset, length)

    def _refuse(self, command: int, cookie: int, errno: int) -> None:
        """Answer a request that was not begun."""
        self._begin()
        self._answer_error(command, cookie, errno)

    def _answer_error(self, command: int, cookie: int, errno: int) -> None:
        if errno and self._structured and command in (Command.READ, Command.BLOCK_STATUS):
            self._traffic.error_count += 1
            self._finish(codec.encode_error_chunk(cookie, errno))
        else:
            self.reply(cookie, errno)

    def _disconnect(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self.stop()

    def _flush(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._traffic.flush_count += 1
        self._start(lambda: self._export.flush(self, cookie), cookie)

    def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if self._may_change(Command.TRIM, cookie, offset, length, beyond=Errno.EINVAL):
            fua = bool(flags & _FUA)
            self._traffic.trim_count += 1
            self._start(lambda: self._export.trim(offset, length, fua, self, cookie), cookie)

    def _write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if self._may_change(Command.WRITE_ZEROES, cookie, offset, length, beyond=Errno.ENOSPC):
            fua = bool(flags & _FUA)
            may_trim = not flags & CommandFlag.NO_HOLE
            self._traffic.zero_count += 1
            self._start(lambda: self._export.write_zeroes(offset, length, may_trim, fua, self, cookie), cookie)

    def _may_change(self, command: int, cookie: int, offset: int, length: int, *, beyond: Errno) -> bool:
        """Whether there is something to do; if not, the request has been answered."""
        if self._export.read_only:
            self._refuse(command, cookie, Errno.EPERM)
        elif length > self._size - offset:
            self._refuse(command, cookie, beyond)
        elif not length:
            self._refuse(command, cookie, Errno.OK)
        else:
            return True
        return False

    def _start(self, call: Callable[[], None], cookie: int) -> None:
        self._begin()
        try:
            call()
        except StillpointError as error:
            self.reply(cookie, nbd_errno(error))

    def _cache(self, flags: int, cookie: int, offset: int, length: int) -> None:
        # A hint, and the page cache knows better.
        self._refuse(Command.CACHE, cookie, Errno.EINVAL if length > self._size - offset else Errno.OK)

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if not self._contexts or not length or length > self._size - offset:
            self._refuse(Command.BLOCK_STATUS, cookie, Errno.EINVAL)
            return
        limit = 1 if flags & CommandFlag.REQ_ONE else _STATUS_EXTENTS_MAX
        chunks = []
        try:
            for context, status in zip(self._contexts, self._status, strict=True):
                extents = list(islice(status(offset, length), limit))
                last = context is self._contexts[-1]
                chunks.append(codec.encode_block_status(cookie, context.id, extents, last=last))
        except StillpointError as error:
            self._refuse(Command.BLOCK_STATUS, cookie, nbd_errno(error))
            return
        self._begin()
        self._finish(b"".join(chunks))


_Handler = Callable[[Transmission, int, int, int, int], None]

# Command to its handler and the flags it may carry. READ and WRITE are told apart before this table is asked.
_COMMANDS: Final[dict[int, tuple[_Handler | None, int]]] = {
    Command.DISC: (Transmission._disconnect, 0xFFFF),
    Command.FLUSH: (Transmission._flush, _FUA),
    Command.TRIM: (Transmission._trim, _FUA),
    Command.CACHE: (Transmission._cache, _FUA),
    Command.WRITE_ZEROES: (Transmission._write_zeroes, int(CommandFlag.FUA | CommandFlag.NO_HOLE)),
    Command.BLOCK_STATUS: (Transmission._block_status, int(CommandFlag.FUA | CommandFlag.REQ_ONE)),
}
_UNKNOWN: Final[tuple[_Handler | None, int]] = (None, 0)
