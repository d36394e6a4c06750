"""One session of the data link, seen from the primary: frames out, watermarks in.

Invariants
- Frames that change or flush the mirror carry the sequence numbers 1, 2, 3 …, in the order of the calls.
- `in_flight_bytes` is what was sent and is not yet acknowledged as applied.
- After `lost` was called nothing more is sent and no watermark is reported.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable

from stillpoint.errors import DeviceError, PeerUnavailable, ProtocolError
from stillpoint.link.base import Link
from stillpoint.link.frames import (
    FAILED,
    MAX_PAYLOAD_SIZE,
    RESYNC,
    WRITE,
    FrameType,
    Verdict,
    Watermarks,
    encode_header,
    read_frames,
)


class Sender:
    """Give it to a link as its receiver, then `attach` the link. Everything happens on the loop."""

    def __init__(
        self,
        *,
        epoch: int,
        session: int,
        lost: Callable[[Exception], None],
    ) -> None:
        """`lost`: the link ended; called once."""
        self._epoch = epoch
        self.session = session
        self.acknowledged: Callable[[Watermarks], None] = _nobody_waits  # the watermarks moved
        self._lost = lost
        self._link: Link | None = None
        self._loop = asyncio.get_running_loop()
        self.watermarks = Watermarks(0, 0, 0)
        self._sequence = 0
        self._sent_bytes = 0
        self._applied_bytes = 0
        # (last sequence, bytes sent up to it, when), oldest first
        self._batches: deque[tuple[int, int, float]] = deque()
        self.heard_at = self._loop.time()
        self.adopted = asyncio.Event()  # the standby has made the session durable and taken the link
        self.verdicts: Callable[[int, int, Verdict], None] | None = None
        self._questions: dict[int, asyncio.Future[bytes]] = {}  # by number: reads that are not answered yet
        self._question = 0
        self._ended = False
        self._moved = asyncio.Event()

    def attach(self, link: Link) -> None:
        self._link = link

    # --- sending; nothing leaves before `push`

    def write(self, offset: int, payload: memoryview, *, owned: bool = False, flags: int = 0) -> int:
        """Returns the sequence of its last frame. The payload is borrowed until `push`, unless `owned`."""
        size = len(payload)
        if size > MAX_PAYLOAD_SIZE:
            sequence = 0
            for at in range(0, size, MAX_PAYLOAD_SIZE):
                sequence = self.write(offset + at, payload[at : at + MAX_PAYLOAD_SIZE], owned=owned, flags=flags)
            return sequence
        assert self._link is not None
        self._sequence = sequence = self._sequence + 1
        self._sent_bytes += size
        header = encode_header(WRITE, flags, self._epoch, self.session, sequence, offset, size, payload)
        if owned:
            self._link.send_owned(header, payload)
        else:
            self._link.send(header, payload)
        return sequence

    def trim(self, offset: int, length: int) -> int:
        return self._command(FrameType.TRIM, offset, length)

    def zero(self, offset: int, length: int, *, may_trim: bool, flags: int = 0) -> int:
        return self._command(FrameType.TRIM if may_trim else FrameType.ZERO, offset, length, flags)

    def flush(self) -> int:
        return self._command(FrameType.FLUSH)

    def resync_begin(self, base: bytes) -> int:
        """base: the generation that both dirty maps are relative to from now on."""
        return self._command(FrameType.RESYNC_BEGIN, flags=RESYNC, payload=base)

    def resync_end(self, state: bytes = b"") -> int:
        """Acknowledged, as flushed, once the standby has made durable that its mirror is the volume.

        state: of the copy here; empty when nothing was sent.
        """
        return self._command(FrameType.RESYNC_END, flags=RESYNC, payload=state)

    def verify(self, offset: int, length: int, digest: bytes) -> None:
        """Ask whether the mirror, with all that was sent before, has this content; `verdicts` is told."""
        assert self._link is not None
        header = encode_header(FrameType.VERIFY, 0, self._epoch, self.session, 0, offset, length, digest)
        self._link.send_owned(header, digest)
        self._link.flush()

    def read(self, offset: int, length: int) -> asyncio.Future[bytes]:
        """The mirror's content of the range, at most 1 MiB, with all that was sent before.

        Raises DeviceError when the standby cannot read it, PeerUnavailable when the link ends first.
        """
        answer: asyncio.Future[bytes] = self._loop.create_future()
        if self._link is None or self._ended:
            answer.set_exception(PeerUnavailable("the data link ended"))
            return answer
        self._question += 1
        self._questions[self._question] = answer
        header = encode_header(FrameType.READ, 0, self._epoch, self.session, self._question, offset, length)
        self._link.send_owned(header)
        self._link.flush()
        return answer

    def _answered(self, question: int, flags: int, length: int, payload: memoryview) -> None:
        answer = self._questions.pop(question, None)
        if answer is None or answer.done():
            return
        if flags & FAILED:
            answer.set_exception(DeviceError(bytes(payload).decode("utf-8", "replace"), errno.EIO))
        elif len(payload) != length:
            raise ProtocolError(f"the standby answered {len(payload)} bytes of {length}")
        else:
            answer.set_result(bytes(payload))

    def ping(self) -> None:
        if self._link is not None and not self._ended:
            self._link.send_owned(encode_header(FrameType.PING, 0, self._epoch, self.session, 0, 0, 0))
            self._link.flush()

    def _command(
        self, frame_type: FrameType, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> int:
        assert self._link is not None
        self._sequence += 1
        header = encode_header(frame_type, flags, self._epoch, self.session, self._sequence, offset, length, payload)
        self._link.send_owned(header, payload)
        return self._sequence

    def push(self) -> None:
        """Send all that was queued; borrowed payloads are the caller's again."""
        if self._link is None:
            return
        if not self._batches or self._batches[-1][0] != self._sequence:
            self._batches.append((self._sequence, self._sent_bytes, self._loop.time()))
        self._link.flush()

    def poll(self, limit_s: float) -> bool:
        """Look for acknowledgements for at most `limit_s`, blocking the loop. True: something came."""
        return self._link is not None and self._link.poll(limit_s)

    @property
    def in_flight_bytes(self) -> int:
        return self._sent_bytes - self._applied_bytes

    @property
    def behind_s(self) -> float:
        """How long the oldest frame that is not acknowledged has been on its way."""
        return self._loop.time() - self._batches[0][2] if self._batches else 0.0

    async def until(self, reached: Callable[[Watermarks], bool]) -> None:
        """Wait until the watermarks satisfy `reached`. Raises PeerUnavailable when the link ends first."""
        while not reached(self.watermarks):
            if self._ended:
                raise PeerUnavailable("the data link ended")
            self._moved.clear()
            await self._moved.wait()

    async def room(self, limit: int) -> None:
        """Wait until less than `limit` bytes are in flight. Raises PeerUnavailable when the link ends first."""
        await self.until(lambda watermarks: self.in_flight_bytes < limit)

    # --- Receiver

    def received(self, data: memoryview, /) -> int:
        self.heard_at = self._loop.time()
        return read_frames(data, self._frame)

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
        if kind == FrameType.ACK:
            if (epoch, session) != (self._epoch, self.session):
                raise ProtocolError("an acknowledgement of another session")
            self._advance(Watermarks.decode(payload))
        elif kind == FrameType.VERIFIED and self.verdicts is not None:
            self.verdicts(offset, length, Verdict(flags))
        elif kind == FrameType.READ_DATA:
            self._answered(sequence, flags, length, payload)
        elif kind == FrameType.ERROR:
            raise PeerUnavailable(f"the standby ended the link: {bytes(payload).decode('utf-8', 'replace')}")
        elif kind != FrameType.PONG:
            raise ProtocolError(f"the standby sent a frame of type {kind}")

    def _advance(self, fresh: Watermarks) -> None:
        old = self.watermarks
        forward = old.received <= fresh.received and old.applied <= fresh.applied and old.flushed <= fresh.flushed
        if not forward or not fresh.flushed <= fresh.applied <= fresh.received <= self._sequence:
            raise ProtocolError("the standby acknowledged what cannot be")
        self.watermarks = fresh
        self.adopted.set()
        batches = self._batches
        while batches and batches[0][0] <= fresh.applied:
            self._applied_bytes = batches.popleft()[1]
        self.acknowledged(fresh)
        self._moved.set()

    def drained(self) -> None:
        self._moved.set()

    def closed(self, error: Exception | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._moved.set()
        self.adopted.set()
        questions, self._questions = self._questions, {}
        for answer in questions.values():
            if not answer.done():
                answer.set_exception(PeerUnavailable("the data link ended"))
        self._lost(error if error is not None else PeerUnavailable("the standby closed the data link"))

    @property
    def ended(self) -> bool:
        return self._ended

    def end(self, error: Exception) -> None:
        """Give the link up."""
        if self._link is not None:
            self._link.abort(error)
        self.closed(error)


def _nobody_waits(watermarks: Watermarks) -> None:
    """Until the session is attached to a volume."""
