"""Calls to the nodes of a cluster. A call that fails raises the StillpointError that the node reported.

Each node's connection is opened when first used, so a command talks to a dead node only if it needs it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..config import Address
from ..errors import ConfigError, PeerUnavailable, StillpointError
from ..tls import Credentials
from ..wire.channel import open_channel
from ..wire.status import from_rpc_error
from ..wire.v1 import backup_pb2_grpc, export_pb2_grpc, primary_pb2_grpc, replica_pb2_grpc, standby_pb2_grpc
from .cluster import Cluster

M = TypeVar("M", bound=Message)

# Long enough for a node that flushes a slow disk first, short enough for an operator who waits at a frozen one.
CALL_TIMEOUT_S = 30.0
STATUS_TIMEOUT_S = 5.0


class Node:
    """One gRPC endpoint: `call` for one answer, `stream` for many."""

    def __init__(self, name: str, address: Address, make_stub: Any, credentials: Credentials | None) -> None:
        self.name = name
        self.address = address
        self.channel = open_channel(address, credentials)
        self._credentials = credentials
        self._stub = make_stub(self.channel)

    async def call(
        self, method: str, request: Message, answer: type[M], *, timeout_s: float | None = CALL_TIMEOUT_S
    ) -> M:
        """timeout_s: None for no limit."""
        try:
            response = await getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self.translate(error) from None
        assert isinstance(response, answer)
        return response

    async def stream(self, method: str, request: Message, answer: type[M]) -> AsyncIterator[M]:
        """The answers one after the other, without a time limit: keepalive notices a peer that is gone."""
        try:
            async for response in getattr(self._stub, method)(request):
                assert isinstance(response, answer)
                yield response
        except grpc.RpcError as error:
            raise self.translate(error) from None

    def translate(self, error: grpc.RpcError) -> StillpointError:
        translated = from_rpc_error(error, peer=f"{self.name} ({self.address})")
        if isinstance(translated, PeerUnavailable):
            return PeerUnavailable(f"{translated}; {self._advice(translated)}")
        return translated

    def _advice(self, error: PeerUnavailable) -> str:
        """What may be the reason: a node says nothing to those whose certificate it does not accept."""
        if self._credentials is not None:
            try:
                self._credentials.check_valid()
            except ConfigError as ours:
                return str(ours)
        if "ocket closed" in str(error):
            return "it may want a certificate, or one of another authority: see `tls` in the cluster file"
        return "is it running? `standbyctl status` shows what is"

    async def is_serving(self, *, timeout_s: float = 1.0) -> bool:
        """What the node's health service says; False when it does not answer."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


@dataclass(frozen=True, slots=True)
class DataNode:
    """A host that holds copies of volumes, and serves or mirrors each."""

    name: str
    replicas: Node  # ReplicaService
    serving: Node  # PrimaryService
    mirroring: Node  # StandbyService
    export: Node | None  # ExportService
    nbd: Address  # of the volumes that it serves
    snapshot_nbd: Address | None


class Nodes:
    """The nodes of one cluster: `async with Nodes(cluster) as nodes`."""

    def __init__(self, cluster: Cluster) -> None:
        """Raises ConfigError for certificates that cannot be used."""
        self.cluster = cluster
        self._credentials = Credentials(cluster.tls.directory) if cluster.tls is not None else None
        self._open: dict[tuple[str, Any], Node] = {}

    async def __aenter__(self) -> Nodes:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self._open.values():
            await node.channel.close()
        self._open.clear()

    @property
    def data_nodes(self) -> list[DataNode]:
        """The hosts that hold copies of volumes, the one whose place it is to serve them first."""
        cluster = self.cluster
        first, second = cluster.primary, cluster.standby
        return [
            self._data_node("primary", first.grpc, first.nbd, first.export_grpc, first.snapshot_nbd),
            self._data_node("standby", second.grpc, second.volume_nbd, second.export_grpc, second.nbd),
        ]

    def _data_node(
        self, name: str, grpc: Address, nbd: Address, export_grpc: Address | None, snapshot_nbd: Address | None
    ) -> DataNode:
        export = export_pb2_grpc.ExportServiceStub
        return DataNode(
            name,
            replicas=self._node(name, grpc, replica_pb2_grpc.ReplicaServiceStub),
            serving=self._node(name, grpc, primary_pb2_grpc.PrimaryServiceStub),
            mirroring=self._node(name, grpc, standby_pb2_grpc.StandbyServiceStub),
            export=self._node(f"{name}'s export", export_grpc, export) if export_grpc is not None else None,
            nbd=nbd,
            snapshot_nbd=snapshot_nbd,
        )

    @property
    def primary(self) -> Node:
        return self._node("primary", self.cluster.primary.grpc, primary_pb2_grpc.PrimaryServiceStub)

    @property
    def standby(self) -> Node:
        return self._node("standby", self.cluster.standby.grpc, standby_pb2_grpc.StandbyServiceStub)

    @property
    def export(self) -> Node:
        return self._node("standby's export", self.cluster.standby.export_grpc, export_pb2_grpc.ExportServiceStub)

    @property
    def backup(self) -> Node:
        return self._node("backup node", self.cluster.backup.grpc, backup_pb2_grpc.BackupServiceStub)

    def _node(self, name: str, address: Address, make_stub: Any) -> Node:
        if (name, make_stub) not in self._open:
            self._open[name, make_stub] = Node(name, address, make_stub, self._credentials)
        return self._open[name, make_stub]
