"""The data link over a gRPC bidirectional stream, for networks where only gRPC passes.

The same frames as over TCP, several to a message. gRPC's cost is per message, so everything queued goes into one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc

from ..channel import Buffer, Receiver
from ..errors import PeerUnavailable, StillpointError
from ..wire import chunks

# Frames in one message; below gRPC's receive limit with one largest frame on top.
_MESSAGE_SIZE = 2 * 1024 * 1024
_SEND_LIMIT = 4 * 1024 * 1024


class GrpcLink:
    """A Link over `read` and `write` of one stream, of a client or a server. Keeps the promise of `link.base.Link`."""

    def __init__(
        self,
        read: Callable[[], Awaitable[object]],
        write: Callable[[bytes], Awaitable[object]],
        receiver: Receiver,
        end: Callable[[], object],
    ) -> None:
        """`end` closes the stream of this side; it is called once."""
        self.receiver = receiver
        self.pending_bytes = 0
        self._read = read
        self._write = write
        self._end = end
        self._queue: list[Buffer] = []
        self._wake = asyncio.Event()
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._was_congested = False
        self._closing = False
        self._dead = False
        self._tasks = [asyncio.ensure_future(self._reader()), asyncio.ensure_future(self._writer())]
        self.finished = asyncio.Event()

    @property
    def congested(self) -> bool:
        return self.pending_bytes > _SEND_LIMIT

    @property
    def is_closed(self) -> bool:
        return self._dead

    def send(self, *buffers: Buffer) -> None:
        self.send_owned(*(bytes(buffer) for buffer in buffers))

    def send_owned(self, *buffers: Buffer) -> None:
        if self._dead or self._closing:
            return
        for buffer in buffers:
            self.pending_bytes += len(buffer)
        self._queue.extend(buffers)

    def flush(self) -> None:
        if self._queue:
            self._wake.set()
        if self.congested:
            self._was_congested = True

    def poll(self, limit_s: float) -> bool:
        return False  # gRPC needs the loop

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def close(self) -> None:
        """Send what is queued, then end the stream."""
        self._closing = True
        self._wake.set()

    def abort(self, error: Exception | None = None) -> None:
        if self._dead:
            return
        self._dead = True
        self._queue.clear()
        self.pending_bytes = 0
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._end()
        self.finished.set()
        asyncio.get_running_loop().call_soon(self.receiver.closed, error)

    async def _writer(self) -> None:
        try:
            while not self._dead:
                await self._wake.wait()
                self._wake.clear()
                while self._queue and not self._dead:
                    message = self._take()
                    await self._write(chunks.encode_frames(message))
                    self.pending_bytes -= len(message)
                    if self._was_congested and self.pending_bytes <= _SEND_LIMIT // 2:
                        self._was_congested = False
                        self.receiver.drained()
                if self._closing:
                    self.abort()
        except Exception as error:  # noqa: BLE001 - whatever ended the stream, the owner is told once
            self.abort(_as_loss(error))

    def _take(self) -> bytes:
        total = count = 0
        for buffer in self._queue:
            if count and total + len(buffer) > _MESSAGE_SIZE and total:
                break
            total += len(buffer)
            count += 1
        message = b"".join(self._queue[:count])
        del self._queue[:count]
        return message

    async def _reader(self) -> None:
        rest = b""
        try:
            while not self._dead:
                message = await self._read()
                if message is None or message is grpc.aio.EOF or not isinstance(message, bytes):
                    self.abort()
                    return
                data = chunks.decode_frames(message)
                if rest:
                    data = memoryview(rest + data)
                while True:
                    await self._may_read.wait()
                    if self._dead:
                        return
                    consumed = self.receiver.received(data)
                    data = data[consumed:]
                    # Left over: the receiver paused, or a frame was cut by the end of a message.
                    if not len(data) or (consumed == 0 and self._may_read.is_set()):
                        break
                rest = bytes(data)
                if len(rest) > 2 * _MESSAGE_SIZE:
                    raise PeerUnavailable("the peer sent a frame larger than allowed")
        except asyncio.CancelledError:
            if not self._dead:
                self.abort()
            raise
        except Exception as error:  # noqa: BLE001 - whatever ended the stream, the owner is told once
            self.abort(_as_loss(error))


def _as_loss(error: Exception) -> Exception:
    if isinstance(error, StillpointError):
        return error
    if isinstance(error, grpc.RpcError):
        return PeerUnavailable("the gRPC stream of the data link ended")
    return error


def over_call(call: grpc.aio.StreamStreamCall[bytes, bytes], receiver: Receiver) -> GrpcLink:
    """The client's end."""
    return GrpcLink(call.read, call.write, receiver, call.cancel)


def over_context(context: grpc.aio.ServicerContext[bytes, bytes], receiver: Receiver) -> GrpcLink:
    """The server's end; its handler awaits `finished` and returns, which ends the stream."""
    return GrpcLink(context.read, context.write, receiver, lambda: None)
