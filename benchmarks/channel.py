"""Our Channel beside asyncio's streams: one message stream over loopback TCP.

    python -m benchmarks.channel [--rounds N]

Each side is a process of its own. The receiver counts bytes as they come; the sender stops at a bound and goes on when
it is told to: `drain` for asyncio, `drained` for the Channel.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import sys
import time
from collections.abc import Callable

import uvloop

from stillpoint.channel import Channel

from .support import markdown_table, medians, take_turns

TOTAL = 1 << 30
SIZES = (4096, 64 * 1024, 1 << 20)


class _Sink:
    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def received(self, data: memoryview, /) -> int:
        return len(data)

    def drained(self) -> None: ...

    def closed(self, error: Exception | None) -> None:
        self.ended.set()


class _Source(_Sink):
    def __init__(self) -> None:
        super().__init__()
        self.room = asyncio.Event()

    def drained(self) -> None:
        self.room.set()


async def _channel_receive(sock: socket.socket) -> None:
    sink = _Sink()
    Channel(sock, sink, receive_size=1 << 20).start()
    await sink.ended.wait()


async def _channel_send(sock: socket.socket, size: int) -> None:
    source = _Source()
    channel = Channel(sock, source)
    channel.start()
    message = bytes(size)
    per_batch = max(1, 128 * 1024 // size)
    for _ in range(TOTAL // size // per_batch):
        channel.send_owned(*([message] * per_batch))
        channel.flush()
        if channel.congested:
            source.room.clear()
            await source.room.wait()
    channel.close()
    await source.ended.wait()


async def _streams_receive(sock: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 20)
    while await reader.read(1 << 20):
        pass
    writer.close()


async def _streams_send(sock: socket.socket, size: int) -> None:
    _, writer = await asyncio.open_connection(sock=sock)
    message = bytes(size)
    per_batch = max(1, 128 * 1024 // size)
    for _ in range(TOTAL // size // per_batch):
        writer.writelines([message] * per_batch)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


KINDS = {"Channel": (_channel_receive, _channel_send), "asyncio streams": (_streams_receive, _streams_send)}


def _receive(kind: str, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setblocking(False)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(KINDS[kind][0](sock))


def measure(kind: str, size: int) -> float:
    """MB/s, from the first byte sent to the receiver's end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = multiprocessing.get_context("spawn").Process(target=_receive, args=(kind, listener.getsockname()[1]))
        receiver.start()
        sock, _ = listener.accept()
        sock.setblocking(False)
        started = time.perf_counter()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(KINDS[kind][1](sock, size))
        elapsed = time.perf_counter() - started
        receiver.join()
    return TOTAL / elapsed / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.channel", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for size in SIZES:
        contestants: dict[str, Callable[[], float]] = {
            kind: (lambda kind=kind, size=size: measure(kind, size))  # type: ignore[misc]
            for kind in KINDS
        }
        ours, theirs = medians(take_turns(contestants, rounds=options.rounds)).values()
        rows.append(
            [f"messages of {size >> 10} KiB", f"{ours:,.0f} MB/s", f"{theirs:,.0f} MB/s", f"{ours / theirs:.2f}"]
        )
    print(markdown_table(["", *KINDS, "ratio"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
