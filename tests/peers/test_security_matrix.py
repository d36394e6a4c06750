"""Who gets in where: every door of a running cluster against every kind of caller, printed as a table.

Only the right role gets in, every refusal is in the log of the node that refused, and the cluster is as it was before.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from benchmarks.support import markdown_table
from stillpoint.channel import Channel
from stillpoint.config import Address
from stillpoint.errors import FencedError, NotFound, PeerUnavailable, PermissionRefused, StillpointError
from stillpoint.link.frames import PROTOCOL_VERSION, FrameType, encode_header
from stillpoint.nbd.client import NbdClient
from stillpoint.nbd.constants import Option
from stillpoint.security.pki import Authority
from stillpoint.security.roles import Role
from stillpoint.tls import Credentials, client_handshake
from stillpoint.tls_socket import TlsSocket
from stillpoint.wire import chunks, streams, v1
from stillpoint.wire.channel import CLIENT_OPTIONS, open_channel
from stillpoint.wire.status import from_rpc_error
from stillpoint.wire.v1 import backup_pb2, backup_pb2_grpc, export_pb2, standby_pb2, standby_pb2_grpc
from tests.support.cluster import LocalCluster
from tests.support.nbd import RawClient
from tests.support.pki import TestPki
from tests.support.replica import primary_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TIMEOUT_S = 10.0
HELLO = encode_header(FrameType.HELLO, 0, 0, 0, 0, 0, 0, bytes(32)) + bytes(32)


@dataclass(frozen=True)
class Caller:
    """Someone at a door. certificates: a folder; None in plaintext. bare: TLS, but no certificate is shown."""

    certificates: Path | None
    bare: bool = False
    epoch: int = 1

    @property
    def credentials(self) -> Credentials | None:
        return Credentials(self.certificates) if self.certificates is not None else None

    def channel(self, address: Address) -> grpc.aio.Channel:
        ours = self.credentials
        if ours is None or not self.bare:
            return open_channel(address, ours)
        return grpc.aio.secure_channel(
            str(address), grpc.ssl_channel_credentials(ours.files.authority), options=CLIENT_OPTIONS
        )


class Refused(Exception):
    """The door stayed shut."""


Knock = Callable[["Scene", Caller], Awaitable[None]]


@dataclass(frozen=True)
class Scene:
    """The cluster as the callers find it."""

    cluster: LocalCluster
    pki: TestPki
    volume_uuid: str

    def address(self, node: str, port: str) -> Address:
        """As the node's configuration says."""
        document = yaml.safe_load((self.cluster.directory / f"{node}.yaml").read_text())
        return Address.parse(document["listen"][port])


# --- the doors: each returns when the caller is in, and raises Refused when not


async def nbd(place: Address, name: str, caller: Caller) -> None:
    scheme = "nbd" if caller.certificates is None else "nbds"
    query = "" if caller.certificates is None else f"?tls-certificates={caller.certificates}"
    try:
        if caller.bare:
            await bare_nbd(place, caller)
        else:
            async with await NbdClient.connect(f"{scheme}://{place}/{name}{query}") as client:
                await client.read(0, 4096)
    except (StillpointError, OSError) as error:
        raise Refused from error


async def bare_nbd(address: Address, caller: Caller) -> None:
    def ask() -> None:
        assert caller.credentials is not None
        context = ssl.create_default_context(cadata=caller.credentials.files.authority.decode())
        with RawClient(address.port) as client:
            client.greet()
            client.start_tls(context)
            client.option(Option.LIST)

    await asyncio.to_thread(ask)


async def nbd_primary(scene: Scene, caller: Caller) -> None:
    await nbd(scene.address("primary", "nbd"), "vol1", caller)


async def nbd_snapshot(scene: Scene, caller: Caller) -> None:
    await nbd(scene.address("standby", "nbd"), "vol1@s1", caller)


async def data_link(scene: Scene, caller: Caller) -> None:
    """In: before the gate that asks for the token of a session. A caller of an old epoch never gets a token."""
    await open_session_of_old_epoch(scene, caller)
    place = scene.address("standby", "data_link")
    began = await asyncio.to_thread(len_of_log, scene, "standby")
    sock = await asyncio.to_thread(socket.create_connection, (place.host, place.port), TIMEOUT_S)
    try:
        if caller.bare:
            await asyncio.to_thread(say_hello_without_certificate, sock, caller)
        elif caller.credentials is not None:
            await say_hello(await client_handshake(sock, caller.credentials, place.host))
        else:
            await say_hello(sock)
    except (StillpointError, OSError) as error:
        raise Refused from error
    finally:
        sock.close()
    await the_gate_asked_for_a_token(scene, began)


def say_hello_without_certificate(sock: socket.socket, caller: Caller) -> None:
    assert caller.credentials is not None
    context = ssl.create_default_context(cadata=caller.credentials.files.authority.decode())
    with context.wrap_socket(sock, server_hostname="localhost") as secured:
        secured.sendall(HELLO)
        secured.recv(1)


async def say_hello(sock: socket.socket | TlsSocket) -> None:
    ended = asyncio.Event()

    class Ends:
        def received(self, data: memoryview, /) -> int:
            return len(data)

        def drained(self) -> None: ...

        def closed(self, error: Exception | None) -> None:
            ended.set()

    channel = Channel(sock, Ends())
    channel.start()
    channel.send_owned(HELLO)
    channel.flush()
    await asyncio.wait_for(ended.wait(), TIMEOUT_S)


async def mirror_stream(scene: Scene, caller: Caller) -> None:
    await open_session_of_old_epoch(scene, caller)
    began = await asyncio.to_thread(len_of_log, scene, "standby")
    async with calling(scene, caller, "standby", "grpc") as channel:
        call: Any = streams.mirror_stream(channel)
        await call.write(chunks.encode_frames(HELLO))
        await call.read()
        if (code := await call.code()) is not grpc.StatusCode.OK:
            raise Refused(code)
    await the_gate_asked_for_a_token(scene, began)


def len_of_log(scene: Scene, node: str) -> int:
    return (scene.cluster.directory / "logs" / f"{node}.log").stat().st_size


async def the_gate_asked_for_a_token(scene: Scene, began: int) -> None:
    deadline = time.monotonic() + 2
    while b"token that is unknown" not in log_since(scene, "standby", began):
        if time.monotonic() > deadline:
            raise Refused("it never came before the gate")
        await asyncio.sleep(0.02)


async def open_session_of_old_epoch(scene: Scene, caller: Caller) -> None:
    if caller.epoch == 1:
        return
    async with calling(scene, caller, "standby", "grpc") as channel:
        stub: Any = standby_pb2_grpc.StandbyServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            await stub.OpenLink(
                standby_pb2.OpenLinkRequest(
                    protocol_min=PROTOCOL_VERSION,
                    protocol_max=PROTOCOL_VERSION,
                    volume="vol1",
                    volume_uuid=scene.volume_uuid,
                    size=SIZE,
                    replica=primary_state(scene.volume_uuid, size=SIZE, epoch=caller.epoch),
                ),
                timeout=TIMEOUT_S,
            )
        except grpc.RpcError as error:
            if not isinstance(from_rpc_error(error, peer="standby"), FencedError):
                raise
            raise Refused from error


async def read_snapshot(scene: Scene, caller: Caller) -> None:
    async with calling(scene, caller, "standby", "export_grpc") as channel:
        request = export_pb2.ReadSnapshotRequest(volume="vol1", snapshot="s1")
        messages = [message async for message in streams.read_snapshot(channel, request)]
        assert sum(chunks.decode(message).length for message in messages) == SIZE


async def backup_service(scene: Scene, caller: Caller) -> None:
    async with calling(scene, caller, "backup", "grpc") as channel:
        stub: Any = backup_pb2_grpc.BackupServiceStub(channel)  # type: ignore[no-untyped-call]
        await stub.ListBackups(backup_pb2.ListBackupsRequest(), timeout=TIMEOUT_S)


async def snapshot_create(scene: Scene, caller: Caller) -> None:
    """Of a volume that does not exist, so that whoever is let in changes nothing either."""
    async with calling(scene, caller, "standby", "grpc") as channel:
        stub: Any = standby_pb2_grpc.StandbyServiceStub(channel)  # type: ignore[no-untyped-call]
        await stub.CreateSnapshot(standby_pb2.CreateSnapshotRequest(volumes=["no-such"]), timeout=TIMEOUT_S)


async def promote(scene: Scene, caller: Caller) -> None:
    """Of a volume that does not exist; an empty message names it so."""
    async with calling(scene, caller, "standby", "grpc") as channel:
        method: Any = channel.unary_unary("/stillpoint.wire.v1.ReplicaService/Promote")
        await method(b"", timeout=TIMEOUT_S)


@contextlib.asynccontextmanager
async def calling(scene: Scene, caller: Caller, node: str, port: str) -> AsyncIterator[grpc.aio.Channel]:
    """Raises Refused for a call that did not get in; NotFound is an answer to one that did."""
    channel = caller.channel(scene.address(node, port))
    try:
        yield channel
    except grpc.RpcError as error:
        translated = from_rpc_error(error, peer=node)
        if isinstance(translated, NotFound):
            return
        if not isinstance(translated, PermissionRefused | PeerUnavailable):
            raise
        raise Refused from error
    except asyncio.InvalidStateError as error:  # the stream was refused before we had written to it
        raise Refused from error
    finally:
        await channel.close()


@dataclass(frozen=True)
class Door:
    name: str
    node: str
    knock: Knock
    right: Role
    wrong: Role
    has_epoch: bool = False
    is_grpc: bool = True


DOORS = [
    Door("NBD primary", "primary", nbd_primary, Role.CLIENT, Role.BACKUP, is_grpc=False),
    Door("NBD snapshot", "standby", nbd_snapshot, Role.CLIENT, Role.DATA, is_grpc=False),
    Door("data link", "standby", data_link, Role.DATA, Role.ADMIN, has_epoch=True, is_grpc=False),
    Door("Mirror stream", "standby", mirror_stream, Role.DATA, Role.BACKUP, has_epoch=True),
    Door("ReadSnapshot", "standby", read_snapshot, Role.BACKUP, Role.CLIENT),
    Door("CreateSnapshot", "standby", snapshot_create, Role.BACKUP, Role.DATA),
    Door("BackupService", "backup", backup_service, Role.ADMIN, Role.BACKUP),
    Door("promote", "standby", promote, Role.ADMIN, Role.BACKUP),
]
SIZE = 16 << 20


def callers(pki: TestPki, door: Door) -> dict[str, Caller | None]:
    """None: there is no such caller at this door."""
    right = pki.issue(door.right)
    return {
        "plaintext": Caller(None),
        "TLS without certificate": Caller(right, bare=True),
        "other CA": Caller(pki.of_other_authority(door.right)),
        "expired": Caller(pki.expired(door.right)),
        "server-only EKU": Caller(pki.server_only(door.right)),
        "right CA, wrong role": Caller(pki.issue(door.wrong)),
        "right role, old epoch": Caller(right, epoch=0) if door.has_epoch else None,
        "right role": Caller(right),
    }


def log_since(scene: Scene, node: str, began: int) -> bytes:
    with (scene.cluster.directory / "logs" / f"{node}.log").open("rb") as log:
        log.seek(began)
        return log.read()


def refusal_in_log(scene: Scene, door: Door, began: int) -> bytes | None:
    """The line that says so. gRPC's own, for what TLS refused, says why but not whom."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        for line in log_since(scene, door.node, began).splitlines():
            if b"refused" in line and (b"peer=" in line or b'"peer"' in line):
                return line
            if door.is_grpc and b"Handshake failed" in line:
                return line
        time.sleep(0.02)
    return None


def state_of(cluster: LocalCluster) -> Any:
    """What nobody may have changed: roles, sessions, snapshots, backups."""
    status = cluster.cli("status")
    volumes = cluster.cli("volume", "list")
    kept = [
        {key: value for key, value in volume.items() if key in ("name", "uuid", "size", "state", "session", "pair")}
        for volume in volumes
    ]
    return status.get("healthy"), kept, cluster.cli("snapshot", "list"), cluster.cli("backup", "list")


async def knock_everywhere(scene: Scene, doors: list[Door]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """What became of each caller at each door, and the refusals that no log tells of."""
    found: dict[str, dict[str, str]] = {}
    untold: list[str] = []
    for door in doors:
        for who, caller in callers(scene.pki, door).items():
            if caller is None:
                found.setdefault(door.name, {})[who] = "-"
                continue
            began = await asyncio.to_thread(len_of_log, scene, door.node)
            try:
                await asyncio.wait_for(door.knock(scene, caller), 3 * TIMEOUT_S)
                outcome = "IN"
            except Refused:
                outcome = "refused"
                if await asyncio.to_thread(refusal_in_log, scene, door, began) is None:
                    untold.append(f"{door.name}: {who}")
            found.setdefault(door.name, {})[who] = outcome
    return found, untold


def has_promotion() -> bool:
    return (Path(v1.__path__[0]) / "replica_pb2_grpc.py").exists()


def test_only_the_right_role_gets_in_and_every_refusal_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalCluster.up(tmp_path / "cluster", "vol1:16MiB", nbd_tls=True) as cluster:
        cluster.cli("snapshot", "create", "vol1", "--name", "s1")
        volume_uuid = cluster.cli("volume", "show", "vol1")["uuid"]
        pki = TestPki(tmp_path / "pki", authority=Authority.open(cluster.directory / "pki"))
        scene = Scene(cluster, pki, volume_uuid)
        doors = [door for door in DOORS if door.name != "promote" or has_promotion()]
        before = state_of(cluster)
        found, untold = asyncio.run(knock_everywhere(scene, doors))
        after = state_of(cluster)
    columns = list(found[doors[0].name])
    table = markdown_table(["", *columns], [[door.name, *found[door.name].values()] for door in doors])
    with capsys.disabled():
        print(f"\n{table}")
    for door in doors:
        expected = {who: "IN" if who == "right role" else "refused" for who in columns}
        if not door.has_epoch:
            expected["right role, old epoch"] = "-"
        assert found[door.name] == expected, door.name
    assert not untold, "refused without a word in the log"
    assert after == before, "somebody who was refused changed something"
