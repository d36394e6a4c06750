"""The outgoing half of one NBD connection: answers, the memory they hold, and when reading has to stop.

Answers are built in the `arena`, one buffer in which headers and read data lie end to end as they will be sent, so
that a batch leaves with one system call.

Invariants
- Memory: the arena, the channel's bounded queue, `_IN_FLIGHT_MAX` requests; everything larger is taken from the
  process-wide budget first, for as long as it is held. What cannot be taken stops this connection from reading.
- Reading stops while any bit of `_pauses` is set.
- `idle` is called once, when the channel is closed and no request runs any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import IntFlag
from typing import Final

from ..channel import Channel
from ..errors import PeerUnavailable
from ..traffic import Traffic
from . import codec
from .budget import Budget
from .constants import SIMPLE_REPLY_MAGIC

ARENA_SIZE: Final = 512 * 1024

_IN_FLIGHT_MAX: Final = 256
# How long a client may keep memory that others wait for.
_STALL_LIMIT_S: Final = 30.0

_SIMPLE_SIZE: Final = codec.SIMPLE_REPLY.size
_pack_simple = codec.SIMPLE_REPLY.pack_into


class Pause(IntFlag):
    """Why a connection does not read."""

    OUTPUT = 1
    """The client does not read its answers."""
    BUDGET = 2
    """Waiting for memory."""
    IN_FLIGHT = 4
    """Too many requests are being worked on."""
    ENDING = 8
    """No further requests are taken; the connection closes when those in flight are answered."""


# Plain numbers for the tests made once a batch.
_IN_FLIGHT: Final = int(Pause.IN_FLIGHT)
_ENDING: Final = int(Pause.ENDING)


class Answers:
    """Answers requests over `channel`. Every request is begun once (`_begin`) and answered once."""

    def __init__(self, channel: Channel, budget: Budget, traffic: Traffic, idle: Callable[[], None]) -> None:
        self._channel = channel
        self._traffic = traffic
        self._budget = budget
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._arena = bytearray(ARENA_SIZE)
        self._arena_view = memoryview(self._arena)
        self._used = 0
        self._owned_queued = False
        self._in_batch = False
        self._send_scheduled = False
        self._in_flight = 0
        self._pauses = 0
        self._wanted = 0  # bytes of budget that are waited for
        self._granted = 0  # bytes of budget that were waited for and have come
        self._receiving = 0  # bytes of budget that a payload still on its way in holds
        self._sending = 0  # bytes of budget that answers on their way out hold
        self._client_awaited_since: float | None = None
        self._ended = False
        budget.join(self)

    # --- answering

    def reply(self, cookie: int, errno: int) -> None:
        """The Replier's promise: a simple reply."""
        used = self._used
        if used + _SIMPLE_SIZE > ARENA_SIZE:
            self._send()
            used = 0
        _pack_simple(self._arena, used, SIMPLE_REPLY_MAGIC, errno, cookie)
        self._used = used + _SIMPLE_SIZE
        self._in_flight -= 1
        if errno:
            self._traffic.error_count += 1
        if not self._in_batch:
            if self._in_flight or self._pauses:
                self._schedule_send()
            else:
                self._send()  # nothing is left that could travel with it

    def _finish(self, answer: bytes | memoryview) -> None:
        """Answer with a buffer that belongs to the channel from here on."""
        if self._used:
            self._channel.send(self._arena_view[: self._used])
            self._used = 0
            self._channel.flush()
        self._channel.send_owned(answer)
        self._owned_queued = True
        self._in_flight -= 1
        if not self._in_batch:
            self._schedule_send()
        elif self._channel.congested:
            self._send()

    def _begin(self) -> None:
        self._in_flight += 1
        if self._in_flight >= _IN_FLIGHT_MAX:
            self._pause(Pause.IN_FLIGHT)

    def _schedule_send(self) -> None:
        if not self._send_scheduled:
            self._send_scheduled = True
            self._loop.call_soon(self._scheduled_send)

    def _scheduled_send(self) -> None:
        self._send_scheduled = False
        self._send()

    def _send(self) -> None:
        """Send what has been answered so far, with one system call where the socket takes it."""
        channel = self._channel
        if self._used:
            channel.send(self._arena_view[: self._used])
            self._used = 0
            channel.flush()
        elif self._owned_queued:
            channel.flush()
        if channel.congested:
            self._pause(Pause.OUTPUT)
            self._await_client()
        elif self._owned_queued:
            self._owned_queued = False
            self._release_sent()
        if self._pauses & _IN_FLIGHT and self._in_flight < _IN_FLIGHT_MAX // 2:
            self._resume(Pause.IN_FLIGHT)
        if self._pauses & _ENDING and self._in_flight == 0:
            self._become_idle()

    def drained(self) -> None:
        """The client reads its answers again."""
        self._client_awaited_since = None
        self._owned_queued = False
        self._release_sent()
        self._resume(Pause.OUTPUT)

    # --- memory and pauses

    def _reserve(self, size: int) -> bool:
        """Take `size` bytes of budget, or stop reading until they are there; the request is then looked at again."""
        granted, self._granted = self._granted, 0
        if granted == size:
            return True
        self._budget.give_back(granted)
        if self._budget.take(size, self._grant):
            return True
        self._wanted = size
        self._pause(Pause.BUDGET)
        return False

    def _grant(self) -> None:
        self._granted = self._wanted
        self._resume(Pause.BUDGET)

    def release(self, size: int) -> None:
        self._budget.give_back(size)

    def _release_sent(self) -> None:
        sent, self._sending = self._sending, 0
        if sent:
            self._budget.give_back(sent)

    def _await_client(self) -> None:
        if self._client_awaited_since is None:
            self._client_awaited_since = time.monotonic()

    def end_if_stalled(self) -> None:
        since = self._client_awaited_since
        held = self._receiving + self._sending
        if since is not None and held and time.monotonic() - since > _STALL_LIMIT_S:
            self._channel.abort(PeerUnavailable(f"the client holds up {held} bytes of memory that others wait for"))

    def _pause(self, reason: Pause) -> None:
        if not self._pauses:
            self._channel.pause_reading()
        self._pauses |= int(reason)

    def _resume(self, reason: Pause) -> None:
        if self._pauses & reason:
            self._pauses &= ~int(reason)
            if not self._pauses:
                self._channel.resume_reading()

    # --- the end

    def stop(self) -> None:
        """Take no more requests; answer those in flight, then close."""
        self._pause(Pause.ENDING)
        self._schedule_send()

    def ended(self) -> None:
        """The channel is closed. Requests in flight go on; their answers go nowhere."""
        self._ended = True
        self._budget.leave(self)
        self._budget.forget(self._grant)
        self._budget.give_back(self._granted + self._receiving)
        self._granted = self._receiving = 0
        self._release_sent()
        self._pauses |= _ENDING
        if self._in_flight == 0:
            self._become_idle()

    def _become_idle(self) -> None:
        self._channel.close()
        if self._ended:
            idle, self._idle = self._idle, _nothing
            idle()


class ChargedReplier:
    """The replier of a write whose payload is counted in the budget."""

    __slots__ = ("_answers", "_size")

    def __init__(self, answers: Answers, size: int) -> None:
        self._answers = answers
        self._size = size

    def reply(self, cookie: int, errno: int) -> None:
        self._answers.release(self._size)
        self._answers.reply(cookie, errno)


def _nothing() -> None:
    """Stands for a callback that was used up."""
