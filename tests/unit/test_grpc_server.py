"""The gRPC server outlives what would end grpc's own."""

from __future__ import annotations

import asyncio
import logging
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillpoint.config import Address
from stillpoint.runtime import serve_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING


def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def call_with_path(path: bytes) -> bytes:
    """The bytes of a connection with one call, its headers written out without compression."""
    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"x",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    block = b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in headers.items())
    end_headers_and_stream = 0x4 | 0x1
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + http2_frame(0x4, 0, 0, b"")
        + http2_frame(0x1, end_headers_and_stream, 1, block)
    )


async def health(address: Address) -> int:
    async with grpc.aio.insecure_channel(str(address), options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
        return int(answer.status)


def test_a_call_whose_path_is_not_utf8_does_not_end_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = await serve_grpc(Address("127.0.0.1", 0), lambda server: None, [])
        try:
            assert await health(server.address) == SERVING
            for _ in range(2):
                with socket.create_connection((server.address.host, server.address.port)) as sock:
                    sock.sendall(call_with_path(b"/\xff/X"))
                    await asyncio.sleep(0.3)
                assert await health(server.address) == SERVING
        finally:
            await server.stop()

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
