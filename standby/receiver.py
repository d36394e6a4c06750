"""One session of the data link, seen from the standby: frames in, watermarks out.

Invariants
- Frames are applied in sequence, without a gap; a frame of another epoch or session ends the link unapplied.
- Watermarks: received = applied = the last frame given to the snapshot engine (which may still hold it in bounded
  memory, as a disk's cache does); flushed = the last FLUSH before which everything is durable.
- A device error ends the session and fails the mirror; nothing after it is acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from stillpoint.errors import DeviceError, FencedError, ProtocolError, StillpointError
from stillpoint.extents import Extent
from stillpoint.link.base import Link
from stillpoint.link.frames import (
    FAILED,
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
from stillpoint.replica import Flags, Generation, ReplicaState
from stillpoint.replica.messages import unpack_generation, unpack_state

from .comparer import Comparer
from .mirror_reader import MirrorReader

if TYPE_CHECKING:
    from .mirror import Mirror

logger = logging.getLogger(__name__)

# Staged writes wait no longer than this for a flush to come.
_STAGE_S = 0.05
_SIGN_OF_LIFE_S = 1.0


class MirrorReceiver:
    """The owner of an adopted link. Everything runs on the loop."""

    def __init__(self, mirror: Mirror, link: Link, *, epoch: int, session: int) -> None:
        self._mirror = mirror
        self._engine = mirror.engine
        self._link = link
        self._epoch = epoch
        self._session = session
        self._loop = asyncio.get_running_loop()
        self.sequence = 0  # the last frame applied
        self.flushed_sequence = 0
        self._flush_wanted = 0  # the last FLUSH received
        self._resync_end = 0  # the sequence of a RESYNC_END not yet answered
        self._resynced: ReplicaState | None = None  # what its frame said
        self._blank = mirror.replica.state.has(Flags.BLANK)
        self._comparer = Comparer(mirror.engine, mirror.device, mirror.executor, self._answer)
        self._reader = MirrorReader(mirror.engine, mirror.device, mirror.executor, self._answer_read)
        self._flushing: asyncio.Task[None] | None = None
        self._committing: asyncio.Task[None] | None = None
        self._beginning: asyncio.Task[None] | None = None
        self._stage_timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._reason = "the primary closed the data link"

    def start(self) -> None:
        """Tell the primary that the session is adopted."""
        self._acknowledge()

    # --- Receiver

    def received(self, data: memoryview, /) -> int:
        before = self.sequence
        consumed = read_frames(data, self._frame)
        self._mirror.received_bytes += consumed
        if self.sequence != before:
            self._acknowledge()
        if self._flush_wanted > self.flushed_sequence and self._flushing is None:
            self._flushing = self._start(self._flush())
        if self._engine.is_worth_commit and self._committing is None and self._flushing is None:
            self._committing = self._start(self._commit())
        self._watch_stage()
        return consumed

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
    ) -> bool:
        if epoch != self._epoch or session != self._session:
            raise FencedError(f"a frame of epoch {epoch}, session {session} came after that session had ended")
        if kind == FrameType.PING:
            self._link.send_owned(encode_header(FrameType.PONG, 0, epoch, session, 0, 0, 0))
            self._link.flush()
            return False
        if kind == FrameType.READ:
            self._reader.ask(sequence, offset, length)
            return False
        if kind == FrameType.VERIFY:
            self._comparer.ask(offset, length, bytes(payload))
            return False
        if sequence != self.sequence + 1:
            raise ProtocolError(f"frame {sequence} follows frame {self.sequence}")
        try:
            self._apply(kind, offset, length, payload)
        except DeviceError as error:
            self._fail(error)
            raise
        self.sequence = sequence
        if self._beginning is not None:
            return True
        if self._engine.wants_commit:
            self._pause_for_commit()
            return True
        return False

    def _apply(self, kind: int, offset: int, length: int, payload: memoryview) -> None:
        if length and self._comparer.busy:
            self._comparer.changed(offset, length)
        if kind == WRITE:
            if self._blank:
                self._no_longer_blank()
            self._engine.write(offset, payload)
        elif kind in (TRIM, ZERO):
            if self._blank:
                self._no_longer_blank()
            if kind == TRIM:
                self._engine.trim(offset, length)
            else:
                self._engine.write_zeroes(offset, length, may_trim=False)
        elif kind == FLUSH:
            self._flush_wanted = self.sequence + 1
        elif kind == FrameType.RESYNC_BEGIN:
            self._link.pause_reading()
            self._beginning = self._start(self._begin_resync(unpack_generation(payload)))
        elif kind == FrameType.RESYNC_END:
            self._resynced = unpack_state(payload) if payload else None
            self._flush_wanted = self._resync_end = self.sequence + 1
        else:
            raise ProtocolError(f"the primary sent a frame of type {kind}")

    def _no_longer_blank(self) -> None:
        self._blank = False
        self._mirror.written()

    def drained(self) -> None: ...

    def closed(self, error: Exception | None) -> None:
        self._comparer.stop()
        self._reader.stop()
        if error is not None and not self._ended:
            self._reason = str(error) or type(error).__name__
        self._ended = True
        if self._stage_timer is not None:
            self._stage_timer.cancel()
        if self._mirror.receiver is self and not self._is_working:
            self._mirror.session_ended(self._reason)

    @property
    def _is_working(self) -> bool:
        return any(task is not None for task in (self._flushing, self._committing, self._beginning))

    async def end(self, reason: str) -> None:
        """Take nothing more; wait for what is running. The mirror is told."""
        self._comparer.stop()
        self._reader.stop()
        if not self._ended:
            self._reason = reason
            self._ended = True
            self._link.abort()
        for task in (self._flushing, self._committing, self._beginning):
            if task is not None:
                await asyncio.wait([task])
        if self._mirror.receiver is self:
            self._mirror.session_ended(self._reason)

    # --- acknowledging, flushing, committing

    def _answer(self, offset: int, length: int, verdict: Verdict) -> None:
        if not self._ended:
            header = encode_header(FrameType.VERIFIED, verdict, self._epoch, self._session, 0, offset, length)
            self._link.send_owned(header)
            self._link.flush()

    def _answer_read(self, question: int, extent: Extent, content: bytes, error: str) -> None:
        if self._ended:
            return
        payload, flags = (error.encode()[:4096], FAILED) if error else (content, 0)
        header = encode_header(
            FrameType.READ_DATA, flags, self._epoch, self._session, question, extent.offset, extent.length, payload
        )
        self._link.send_owned(header, payload)
        self._link.flush()

    def _acknowledge(self) -> None:
        watermarks = Watermarks(self.sequence, self.sequence, self.flushed_sequence).encode()
        header = encode_header(FrameType.ACK, 0, self._epoch, self._session, 0, 0, 0, watermarks)
        self._link.send_owned(header, watermarks)
        self._link.flush()

    async def _flush(self) -> None:
        """Until no flush is wanted: each makes durable everything received before it, and shares it with later ones."""
        try:
            while self._flush_wanted > self.flushed_sequence and not self._ended:
                wanted = self._flush_wanted
                await self._engine.flush()
                if 0 < self._resync_end <= wanted:
                    self._resync_end = 0
                    await self._mirror.resync_ended(self._resynced)
                self.flushed_sequence = wanted
                if not self._ended:
                    self._acknowledge()
        finally:
            self._flushing = None
            self._watch_stage()

    def _watch_stage(self) -> None:
        if self._engine.staged_bytes and self._stage_timer is None and not self._ended:
            self._stage_timer = self._loop.call_later(_STAGE_S, self._stage_is_old)

    async def _begin_resync(self, base: Generation) -> None:
        """Nothing more is read before it is durable that the copy is about to become a mixture."""
        beginning = asyncio.ensure_future(self._mirror.resync_began(base))
        try:
            # Pings are not read meanwhile, and a slow disk must not look like a node that is gone.
            while not (await asyncio.wait([beginning], timeout=_SIGN_OF_LIFE_S))[0]:
                if not self._ended:
                    self._acknowledge()
            await beginning
        finally:
            self._beginning = None
            self._resume_reading()

    def _stage_is_old(self) -> None:
        self._stage_timer = None
        if self._committing is None and self._flushing is None and not self._ended:
            self._committing = self._start(self._commit())

    def _pause_for_commit(self) -> None:
        self._link.pause_reading()
        if self._committing is None:
            self._committing = self._start(self._commit())

    async def _commit(self) -> None:
        try:
            while self._engine.staged_bytes:
                await self._engine.commit()
                if not self._engine.wants_commit:
                    break
        finally:
            self._committing = None
            self._watch_stage()  # its timer may have come and gone while older changes were committed
            self._resume_reading()

    def _resume_reading(self) -> None:
        if not self._ended and self._committing is None and self._beginning is None:
            self._link.resume_reading()

    def _start(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(work)  # type: ignore[arg-type]
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, StillpointError):
            self._fail(error)
            self._link.abort(error)
        elif error is not None:
            logger.error("mirroring stopped", exc_info=error, extra={"volume": self._mirror.record.volume})
            self._mirror.failed(f"internal error: {error}")
            self._link.abort(StillpointError("internal error"))
        if self._ended and self._mirror.receiver is self and not self._is_working:
            self._mirror.session_ended(self._reason)

    def _fail(self, error: StillpointError) -> None:
        self._mirror.failed(str(error))
        text = str(error).encode()[:4096]
        self._link.send_owned(encode_header(FrameType.ERROR, 0, self._epoch, self._session, 0, 0, 0, text), text)
        self._link.flush()
