"""The primary's calls to the standby."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from stillpoint.config import Address
from stillpoint.errors import ProtocolError
from stillpoint.extents import Extent
from stillpoint.link import grpc as grpc_link
from stillpoint.link import tcp
from stillpoint.link.base import Link
from stillpoint.link.frames import PROTOCOL_VERSION, FrameType, encode_header
from stillpoint.replica import ReplicaState
from stillpoint.replica.messages import pack_state, unpack_state
from stillpoint.tls import Credentials
from stillpoint.wire import streams
from stillpoint.wire.channel import open_channel
from stillpoint.wire.status import from_rpc_error
from stillpoint.wire.v1 import common_pb2, replica_pb2, replica_pb2_grpc, standby_pb2, standby_pb2_grpc

from .config import Carrier
from .record import VolumeRecord
from .sender import Sender

_TIMEOUT_S = 10.0
_PROMOTE_TIMEOUT_S = 60.0
_RESIZE_TIMEOUT_S = 300.0  # what is newly used of a disk is zeroed first


class StandbyClient:
    """One standby. Every call raises what the standby answered, or PeerUnavailable."""

    def __init__(
        self, address: Address, carrier: Carrier, *, node: str, credentials: Credentials | None = None
    ) -> None:
        self.address = address
        self.carrier = carrier
        self._node = node
        self._credentials = credentials
        self._channel = open_channel(address, credentials)
        self._stub = standby_pb2_grpc.StandbyServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._replicas = replica_pb2_grpc.ReplicaServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        await self._channel.close()

    @contextlib.asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=f"standby at {self.address}") from None

    async def create_mirror(self, record: VolumeRecord, device_paths: list[str]) -> None:
        async with self._errors():
            await self._stub.CreateMirror(
                standby_pb2.CreateMirrorRequest(
                    volume=record.name,
                    volume_uuid=record.uuid,
                    size=record.size,
                    block_size=record.block_size,
                    device_paths=device_paths,
                ),
                timeout=_TIMEOUT_S,
            )

    async def resize_mirror(self, record: VolumeRecord, size: int) -> None:
        async with self._errors():
            await self._stub.ResizeMirror(
                standby_pb2.ResizeMirrorRequest(volume=record.name, volume_uuid=record.uuid, size=size),
                timeout=_RESIZE_TIMEOUT_S,
            )

    async def delete_mirror(self, record: VolumeRecord, *, force: bool) -> None:
        async with self._errors():
            await self._stub.DeleteMirror(
                standby_pb2.DeleteMirrorRequest(volume=record.name, volume_uuid=record.uuid, force=force),
                timeout=_TIMEOUT_S,
            )

    async def open_link(self, volume: str, state: ReplicaState, dirty_bytes: int, mode: str) -> OpenedLink:
        """state, dirty_bytes: of the copy here. Raises FencedError when the other node follows a newer primary."""
        async with self._errors():
            response = await self._stub.OpenLink(
                standby_pb2.OpenLinkRequest(
                    protocol_min=PROTOCOL_VERSION,
                    protocol_max=PROTOCOL_VERSION,
                    volume=volume,
                    volume_uuid=str(state.volume),
                    size=state.size,
                    replica=pack_state(state),
                    dirty_bytes=dirty_bytes,
                    mode=mode,
                ),
                timeout=_TIMEOUT_S,
            )
        if response.protocol != PROTOCOL_VERSION:
            raise ProtocolError(f"the standby speaks version {response.protocol} of the data link")
        return OpenedLink(
            volume,
            unpack_state(response.replica),
            response.dirty_bytes,
            response.session,
            response.token,
            response.data_link_port,
            self,
        )

    async def list_dirty(self, volume: str, volume_uuid: str) -> AsyncIterator[Extent]:
        request = replica_pb2.ListDirtyRequest(volume=volume, volume_uuid=volume_uuid)
        async with self._errors():
            async for part in self._replicas.ListDirty(request):
                for offset, length in zip(part.offsets, part.lengths, strict=True):
                    yield Extent(offset, length)

    async def list_replicas(self, *, timeout_s: float) -> replica_pb2.ReplicaList:
        async with self._errors():
            answer: replica_pb2.ReplicaList = await self._replicas.ListReplicas(common_pb2.Empty(), timeout=timeout_s)
        return answer

    async def promote(self, volume: str, *, mode: str) -> replica_pb2.PromoteResponse:
        async with self._errors():
            answer: replica_pb2.PromoteResponse = await self._replicas.Promote(
                replica_pb2.PromoteRequest(volume=volume, mode=mode), timeout=_PROMOTE_TIMEOUT_S
            )
        return answer

    async def connect(self, opened: OpenedLink, sender: Sender) -> Link:
        if self.carrier is Carrier.TCP:
            address = Address(self.address.host, opened.port)
            return await tcp.connect(address, opened.token, sender, credentials=self._credentials)
        link = grpc_link.over_call(streams.mirror_stream(self._channel), sender)
        link.send_owned(encode_header(FrameType.HELLO, 0, 0, 0, 0, 0, 0, opened.token), opened.token)
        link.flush()
        return link


@dataclass(frozen=True, slots=True)
class OpenedLink:
    """What OpenLink answered, and how to go on from there."""

    volume: str
    state: ReplicaState
    dirty_bytes: int
    session: int
    token: bytes
    port: int
    client: StandbyClient

    async def connect(self, sender: Sender) -> Link:
        return await self.client.connect(self, sender)

    def list_dirty(self) -> AsyncIterator[Extent]:
        return self.client.list_dirty(self.volume, str(self.state.volume))
