"""The far end of a data link, in memory: it applies real frames to an image, and acknowledges when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from primary.sender import Sender
from stillpoint.channel import Buffer, Receiver
from stillpoint.digest import digest
from stillpoint.errors import PeerUnavailable
from stillpoint.link.frames import (
    FLUSH,
    TRIM,
    WRITE,
    ZERO,
    FrameType,
    Verdict,
    Watermarks,
    encode_header,
    read_frames,
)


class MirrorLink:
    """A `Link` whose standby lives here. `image` is what it has applied, `durable` what a crash of it leaves.

    slow: acknowledgements wait for `acknowledge`; else they follow in the next turn of the loop.
    """

    def __init__(self, size: int, *, image: bytearray | None = None, session: int = 1) -> None:
        self.image = bytearray(size) if image is None else image
        self.durable = bytearray(self.image)
        self.slow = False
        self.answers_held: list[bytes] | None = None  # a list: answers to reads are put here
        self.sent_bytes = 0  # payloads that arrived
        self.ended: Exception | None = None
        self.lost: Callable[[Exception], None] = lambda error: None  # who is told, besides
        self.sender = Sender(epoch=1, session=session, lost=self._lost)
        self.sender.attach(self)
        self.receiver: Receiver = self.sender
        self.pending_bytes = 0
        self._session = session
        self._queue: list[bytes] = []
        self._applied = self._flushed = self._flush_wanted = 0
        self._loop = asyncio.get_running_loop()

    def _lost(self, error: Exception) -> None:
        self.ended = error
        self.lost(error)

    # --- Link

    @property
    def congested(self) -> bool:
        return False

    @property
    def is_closed(self) -> bool:
        return self.ended is not None

    def send(self, *buffers: Buffer) -> None:
        self._queue += [bytes(buffer) for buffer in buffers]

    def send_owned(self, *buffers: Buffer) -> None:
        self.send(*buffers)

    def flush(self) -> None:
        data = memoryview(b"".join(self._queue))
        self._queue.clear()
        assert read_frames(data, self._frame) == len(data)
        if len(data) and not self.slow:
            self._loop.call_soon(self.acknowledge)

    def poll(self, limit_s: float) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...

    def abort(self, error: Exception | None = None) -> None: ...

    # --- the standby

    def _frame(
        self,
        kind: int,
        flags: int,
        epoch: int,
        session: int,
        sequence: int,
        offset: int,
        length: int,
        payload: memoryview,
    ) -> None:
        assert (epoch, session) == (1, self._session)
        if kind == FrameType.READ:
            content = bytes(self.image[offset : offset + length])
            header = encode_header(FrameType.READ_DATA, 0, 1, self._session, sequence, offset, length, content)
            if self.answers_held is None:
                self._loop.call_soon(self._deliver, header + content)
            else:
                self.answers_held.append(header + content)
            return
        if kind == FrameType.VERIFY:
            there = bytes(self.image[offset : offset + length])
            same = digest(there) == bytes(payload) if len(payload) else not any(there)
            verdict = Verdict.SAME if same else Verdict.DIFFERENT
            header = encode_header(FrameType.VERIFIED, verdict, 1, self._session, 0, offset, length)
            self._loop.call_soon(self._deliver, header)
            return
        if not sequence:
            return
        assert sequence == self._applied + 1
        self._applied = sequence
        if kind == WRITE:
            self.changed(offset, length, payload)
            self.sent_bytes += length
        elif kind in (TRIM, ZERO):
            self.changed(offset, length, None)
        elif kind in (FLUSH, FrameType.RESYNC_END):
            self.harden()  # durable before it is said
            self._flush_wanted = sequence

    def changed(self, offset: int, length: int, payload: memoryview | None) -> None:
        self.image[offset : offset + length] = bytes(length) if payload is None else payload

    def harden(self) -> None:
        self.durable[:] = self.image

    def acknowledge(self) -> None:
        """Say what has been applied and made durable."""
        self._flushed = self._flush_wanted
        watermarks = Watermarks(self._applied, self._applied, self._flushed).encode()
        header = encode_header(FrameType.ACK, 0, 1, self._session, 0, 0, 0, watermarks)
        self._deliver(header + watermarks)

    def _deliver(self, data: bytes) -> None:
        if self.ended is None:
            self.receiver.received(memoryview(data))

    def answer(self) -> None:
        """Send the answers to reads that were held."""
        held, self.answers_held = self.answers_held, None
        for data in held or ():
            self._deliver(data)

    def break_off(self) -> None:
        """The connection is lost; the standby keeps what it has."""
        self.receiver.closed(PeerUnavailable("cut off on purpose"))
