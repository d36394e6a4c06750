"""Reading a snapshot over gRPC, beside a bare grpcio stream of the same messages.

    python -m benchmarks.streams [--rounds N]

The bare stream yields one ready message of 1 MiB again and again, without protobuf: it is what the transport can do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from stillpoint.config import Address
from stillpoint.wire import chunks, streams
from stillpoint.wire.channel import SERVER_OPTIONS, open_channel
from stillpoint.wire.v1 import export_pb2

from .mirror import SIZE, standbyctl
from .mirror import stillpoint_pair as pair
from .support import BenchmarkError, find_tools, markdown_table, medians, memory_folder, take_turns

MESSAGE_COUNT = SIZE >> 20


def serve_bare() -> None:
    """The peer's process: prints its port and serves until it is killed."""

    async def answer(request: bytes, context: object) -> AsyncIterator[bytes]:
        message = chunks.encode_data(0, bytes(1 << 20))
        for _ in range(MESSAGE_COUNT):
            yield message

    async def serve() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handlers: dict[str, Any] = {"Read": grpc.unary_stream_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


async def read_bare(address: Address) -> float:
    async with open_channel(address) as channel:
        started = time.perf_counter()
        total = 0
        read: Any = channel.unary_stream("/bare/Read")
        async for message in read(b""):
            total += len(message)
        return total / (time.perf_counter() - started) / 1e6


async def read_snapshot(address: Address) -> float:
    """Every message is decoded and its checksum compared, as the backup node does."""
    async with open_channel(address) as channel:
        started = time.perf_counter()
        total = 0
        request = export_pb2.ReadSnapshotRequest(volume="bench", snapshot="s")
        async for message in streams.read_snapshot(channel, request):
            total += chunks.decode(message).length
        return total / (time.perf_counter() - started) / 1e6


def run(rounds: int) -> str:
    with contextlib.ExitStack() as stack:
        folder: Path = stack.enter_context(memory_folder())
        stack.enter_context(pair(folder / "stillpoint", "tcp"))
        cluster = str(folder / "stillpoint" / "cluster.yaml")
        standbyctl("--cluster", cluster, "snapshot", "create", "bench", "--name", "s")
        export = next(
            line.split('"')[1] if '"' in line else line.split()[1]
            for line in (folder / "stillpoint" / "cluster.yaml").read_text().replace(",", "\n").splitlines()
            if "export_grpc" in line
        )
        bare = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", "from benchmarks.streams import serve_bare; serve_bare()"],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(bare.kill)
        assert bare.stdout is not None
        port = int(bare.stdout.readline())
        contestants: dict[str, Callable[[], float]] = {
            "ReadSnapshot": lambda: asyncio.run(read_snapshot(Address.parse(export.strip()))),
            "bare grpcio stream": lambda: asyncio.run(read_bare(Address("127.0.0.1", port))),
        }
        results = medians(take_turns(contestants, rounds=rounds, on_round=lambda line: print(line, file=sys.stderr)))
    ours, theirs = results.values()
    return markdown_table(
        ["", *results, "ours / bare"],
        [["messages of 1 MiB", f"{ours:,.0f} MB/s", f"{theirs:,.0f} MB/s", f"{ours / theirs:.2f}"]],
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    try:
        find_tools("fio")
        print(run(options.rounds))
    except BenchmarkError as error:
        print(f"benchmarks.streams: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
