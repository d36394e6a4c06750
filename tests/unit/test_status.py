"""Errors across a gRPC connection: the right code, one line, nothing of ours leaked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from stillpoint import errors
from stillpoint.config import Address
from stillpoint.wire import streams
from stillpoint.wire.channel import SERVER_OPTIONS, open_channel
from stillpoint.wire.status import Context, answers, code_of, from_rpc_error
from stillpoint.wire.v1 import export_pb2, export_pb2_grpc


class Service(export_pb2_grpc.ExportServiceServicer):
    def __init__(self, error: Exception) -> None:
        self._error = error

    @answers
    async def DescribeSnapshot(self, request: object, context: Context) -> export_pb2.SnapshotDescription:
        raise self._error

    @answers
    async def ReadSnapshot(self, request: object, context: Context) -> AsyncIterator[bytes]:
        yield b""
        raise self._error


async def ask(error: Exception, *, stream: bool) -> errors.StillpointError:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    export_pb2_grpc.add_ExportServiceServicer_to_server(Service(error), streams.RawServer(server))  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(Address("127.0.0.1", port)) as channel:
            stub: Any = export_pb2_grpc.ExportServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                if stream:
                    async for _ in streams.read_snapshot(channel, export_pb2.ReadSnapshotRequest()):
                        pass
                else:
                    await stub.DescribeSnapshot(export_pb2.DescribeSnapshotRequest())
            except grpc.RpcError as failure:
                return from_rpc_error(failure, peer="standby at x:1")
    finally:
        await server.stop(0)
    raise AssertionError("the call succeeded")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "arrives_as"),
    [
        (errors.NotFound("there is no volume 'x'"), errors.NotFound),
        (errors.InvalidRequest("a size of 0"), errors.InvalidRequest),
        (errors.OutOfRange("outside"), errors.OutOfRange),
        (errors.InUse("in use"), errors.Refused),
        (errors.PermissionRefused("read-only"), errors.PermissionRefused),
        (errors.FencedError("older epoch"), errors.FencedError),
        (errors.StoreFull("full"), errors.StoreFull),
        (errors.SnapshotInvalid("lost blocks"), errors.DataCorrupt),
        (errors.DeviceError("disk failed", 5), errors.StillpointError),
    ],
)
def test_an_operating_error_crosses_the_wire_with_its_line(
    error: errors.StillpointError, arrives_as: type[errors.StillpointError], stream: bool
) -> None:
    arrived = asyncio.run(ask(error, stream=stream))
    assert type(arrived) is arrives_as
    assert str(error) in str(arrived)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_tells_the_peer_nothing_of_ours(stream: bool) -> None:
    arrived = asyncio.run(ask(KeyError("secret"), stream=stream))
    assert "secret" not in str(arrived)
    assert "see the node's log" in str(arrived)


def test_a_very_long_line_is_cut_and_keeps_its_code() -> None:
    arrived = asyncio.run(ask(errors.InvalidRequest("x" * 1_000_000), stream=False))
    assert type(arrived) is errors.InvalidRequest
    assert len(str(arrived)) <= 2000


def test_a_peer_that_is_not_there_is_named() -> None:
    async def call() -> errors.StillpointError:
        async with open_channel(Address("127.0.0.1", 1)) as channel:
            stub: Any = export_pb2_grpc.ExportServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                await stub.DescribeSnapshot(export_pb2.DescribeSnapshotRequest())
            except grpc.RpcError as failure:
                return from_rpc_error(failure, peer="standby at x:1")
        raise AssertionError("the call succeeded")

    arrived = asyncio.run(call())
    assert type(arrived) is errors.PeerUnavailable
    assert str(arrived) == "the standby at x:1 cannot be reached: connection refused"


def test_every_kind_of_error_has_a_code() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.StillpointError)
    ]
    for kind in kinds:
        error = kind("x", 5) if kind is errors.DeviceError else kind("x")
        assert code_of(error) is not None
