"""Certificates in use: handshakes, the data link's door, and certificates that are renewed under a running node."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillpoint.channel import Channel, Receiver
from stillpoint.config import Address
from stillpoint.errors import ConfigError, PeerUnavailable, PermissionRefused, ProtocolError, StillpointError
from stillpoint.link import tcp
from stillpoint.link.base import Link
from stillpoint.link.tokens import Tokens
from stillpoint.nbd.listen import listen_tcp
from stillpoint.runtime import serve_grpc
from stillpoint.security.pki import Authority
from stillpoint.security.roles import Identity, Role
from stillpoint.tls import Credentials, client_handshake, peer_identity, server_handshake
from stillpoint.tls_socket import TlsSocket
from stillpoint.wire.channel import open_channel
from tests.support.pki import LOOPBACK, TestPki


@pytest.fixture
def pki(tmp_path: Path) -> TestPki:
    return TestPki(tmp_path)


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work, 30))


async def meet(server: Credentials, client: Credentials, host: str = "localhost") -> tuple[TlsSocket, TlsSocket]:
    """Both ends of a connection whose handshake is complete."""
    ours, theirs = socket.socketpair()
    async with asyncio.TaskGroup() as tasks:
        accepted = tasks.create_task(server_handshake(ours, server))
        connected = tasks.create_task(client_handshake(theirs, client, host))
    return accepted.result(), connected.result()


class Noting:
    """Owns a channel and keeps what happens to it."""

    def __init__(self) -> None:
        self.data = b""
        self.ended = asyncio.Event()
        self.error: Exception | None = None

    def received(self, data: memoryview, /) -> int:
        self.data += data
        return len(data)

    def drained(self) -> None: ...

    def closed(self, error: Exception | None) -> None:
        self.error = error
        self.ended.set()


# --- handshakes


def test_both_sides_learn_who_the_other_is(pki: TestPki) -> None:
    async def story() -> None:
        server, client = await meet(pki.credentials(Role.DATA, "node-a"), pki.credentials(Role.BACKUP, "vault"))
        assert peer_identity(server) == Identity(Role.BACKUP, "vault")
        assert peer_identity(client) == Identity(Role.DATA, "node-a")
        assert server.version() == "TLSv1.3"
        server.close()
        client.close()

    run(story())


def test_no_session_is_resumed_so_that_every_connection_shows_its_certificate(pki: TestPki) -> None:
    context, server = pki.credentials(Role.CLIENT).client_context(), pki.credentials(Role.DATA)

    async def story() -> None:
        ours, theirs = socket.socketpair()
        accepting = asyncio.create_task(server_handshake(ours, server))
        client = await asyncio.to_thread(context.wrap_socket, theirs, server_hostname="localhost")
        accepted = await accepting
        accepted.send(b"x")
        assert await asyncio.to_thread(client.recv, 1) == b"x"
        assert client.session is None or not client.session.has_ticket
        accepted.close()
        client.close()

    run(story())


def test_an_older_tls_is_refused(pki: TestPki) -> None:
    context = pki.credentials(Role.CLIENT).client_context()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.load_verify_locations(cadata=pki.credentials(Role.CLIENT).files.authority.decode())
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3

    async def story() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(True)
            talking = asyncio.create_task(asyncio.to_thread(_try_to_talk, old, theirs))
            with pytest.raises(PermissionRefused, match="protocol"):
                await server_handshake(ours, pki.credentials(Role.DATA))
            await talking

    run(story())


def _try_to_talk(context: ssl.SSLContext, sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        context.wrap_socket(sock, server_hostname="localhost")


def test_a_silent_peer_is_given_up_in_time_and_its_socket_closed(pki: TestPki) -> None:
    async def story() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            with pytest.raises(PeerUnavailable, match=r"within 0\.1 s"):
                await server_handshake(ours, pki.credentials(Role.DATA), timeout_s=0.1)
            assert theirs.recv(1) == b""

    run(story())


# --- giving a socket to TLS


def test_a_channel_gives_its_socket_back_only_with_nothing_left_in_it() -> None:
    async def story() -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with theirs:
            owner = Stopping()
            channel = Channel(ours, owner)
            owner.channel = channel
            channel.start()
            theirs.sendall(b"abc")
            await owner.stopped.wait()
            with pytest.raises(ProtocolError, match="sent more before TLS"):
                channel.detach()
            owner.takes = 3
            channel.resume_reading()
            await asyncio.sleep(0.01)
            channel.pause_reading()
            channel.send_owned(bytes(1 << 20))
            channel.flush()
            with pytest.raises(ProtocolError, match="does not read"):
                channel.detach()
            assert not channel.is_closed
            channel.abort()

    run(story())


class Stopping(Noting):
    """Takes one byte and then reads no more."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = 1
        self.stopped = asyncio.Event()
        self.channel: Channel | None = None

    def received(self, data: memoryview, /) -> int:
        assert self.channel is not None
        self.channel.pause_reading()
        self.stopped.set()
        return min(self.takes, len(data))


# --- the data link


@contextlib.asynccontextmanager
async def data_link(
    credentials: Credentials,
) -> AsyncIterator[tuple[tcp.DataLinkListener, Callable[[], bytes], list[Link]]]:
    """The listener, a maker of tokens, and the links that were adopted."""
    tokens, links = Tokens(), list[Link]()

    def adopt(link: Link) -> Receiver:
        links.append(link)
        return Noting()

    listener = tcp.DataLinkListener(listen_tcp("127.0.0.1", 0), tokens, credentials)
    try:
        yield listener, lambda: tokens.issue(adopt), links
    finally:
        for link in links:
            link.abort()
        listener.close()


@pytest.mark.parametrize("role", list(Role))
def test_the_data_link_lets_in_data_nodes_alone(pki: TestPki, role: Role, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with data_link(pki.credentials(Role.DATA, "standby")) as (listener, token, links):
            owner = Noting()
            address = Address("127.0.0.1", listener.port)
            channel = await tcp.connect(address, token(), owner, credentials=pki.credentials(role, "caller"))
            if role is Role.DATA:
                await until(lambda: bool(links))
                channel.abort()
            await owner.ended.wait()
            assert bool(links) == (role is Role.DATA)

    with caplog.at_level(logging.WARNING):
        run(story())
    refused = [line for line in caplog.records if line.getMessage().startswith("data link refused")]
    assert [line.__dict__["identity"] for line in refused] == ([] if role is Role.DATA else [f"{role.value}:caller"])


def test_a_data_node_without_the_token_is_refused_and_named(pki: TestPki, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with data_link(pki.credentials(Role.DATA, "standby")) as (listener, _, links):
            owner = Noting()
            address = Address("127.0.0.1", listener.port)
            await tcp.connect(address, bytes(32), owner, credentials=pki.credentials(Role.DATA, "liar"))
            await owner.ended.wait()
            assert not links

    with caplog.at_level(logging.WARNING):
        run(story())
    (line,) = [line for line in caplog.records if line.getMessage().startswith("data link refused")]
    assert line.__dict__["peer"].startswith("data:liar at 127.0.0.1:")


def test_a_primary_sends_nothing_to_what_is_no_data_node(pki: TestPki) -> None:
    async def story() -> None:
        async with data_link(pki.credentials(Role.BACKUP)) as (listener, token, links):
            address = Address("127.0.0.1", listener.port)
            with pytest.raises(PermissionRefused, match="no data node but backup:backup1"):
                await tcp.connect(address, token(), Noting(), credentials=pki.credentials(Role.DATA))
            assert not links

    run(story())


def test_strangers_at_the_data_link_are_bounded_and_timed_while_they_shake_hands(pki: TestPki) -> None:
    async def story() -> None:
        async with data_link(pki.credentials(Role.DATA)) as (listener, token, links):
            strangers = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(40)]
            await asyncio.sleep(0.1)
            closed = 0
            for stranger in strangers:
                stranger.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    closed += stranger.recv(1) == b""
            assert closed == 8
            for stranger in strangers:
                stranger.close()
            await asyncio.sleep(0.1)
            address = Address("127.0.0.1", listener.port)
            channel = await tcp.connect(address, token(), Noting(), credentials=pki.credentials(Role.DATA))
            await until(lambda: bool(links))
            channel.abort()

    run(story())


def test_no_data_link_in_plaintext_for_other_machines() -> None:
    async def story() -> None:
        with listen_tcp("0.0.0.0", 0) as sock, pytest.raises(ConfigError, match="there are no certificates"):
            tcp.DataLinkListener(sock, Tokens())
        with pytest.raises(ConfigError, match="there are no certificates"):
            await serve_grpc(Address("0.0.0.0", 0), lambda _: None, [])

    run(story())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


# --- renewal


def renew(pki: TestPki, folder: Path, identity: Identity) -> int:
    """A new certificate in the folder; its serial number."""
    pki.authority.renew(folder, identity, lifetime=datetime.timedelta(days=80))
    return serial(Credentials(folder))


def serial(credentials: Credentials) -> int:
    return x509.load_pem_x509_certificate(credentials.certificate_pem).serial_number


def test_a_renewed_certificate_is_shown_from_the_next_connection_on(pki: TestPki) -> None:
    folder, client = pki.issue(Role.DATA), pki.credentials(Role.CLIENT)
    server = Credentials(folder)

    async def shown() -> int:
        accepted, connected = await meet(server, client)
        number = int(str(connected.peer_certificate()["serialNumber"]), 16)
        accepted.close()
        connected.close()
        return number

    async def story() -> None:
        before = serial(server)
        assert await shown() == before
        after = renew(pki, folder, Identity(Role.DATA, "data1"))
        assert await shown() == after != before

    run(story())


def test_certificates_that_cannot_be_used_leave_those_before_in_use(
    pki: TestPki, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pki.issue(Role.DATA)
    credentials = Credentials(folder)
    whole = (folder / "cert.pem").read_bytes()
    for broken in (b"", b"rubbish", whole[: len(whole) // 2], (pki.issue(Role.ADMIN) / "cert.pem").read_bytes()):
        caplog.clear()
        (folder / "cert.pem").write_bytes(broken)
        assert [credentials.refresh() for _ in range(3)] == [1, 1, 1]
        assert credentials.certificate_pem == whole
        assert len(caplog.records) == 1, "said once, not at each connection"
    (folder / "cert.pem").unlink()
    assert credentials.refresh() == 1
    (folder / "cert.pem").write_bytes(whole)
    assert credentials.refresh() == 2


def test_another_authority_takes_over_without_a_restart(tmp_path: Path) -> None:
    """All folders are replaced: the old certificates are worth nothing from then on."""
    pki = TestPki(tmp_path / "old")
    folder, kept = pki.issue(Role.DATA), pki.credentials(Role.CLIENT)
    server = Credentials(folder)
    fresh = Authority.create(tmp_path / "new")
    shutil.rmtree(folder)
    fresh.issue(Identity(Role.DATA, "data1"), folder, hosts=LOOPBACK)

    async def story() -> None:
        ours, theirs = socket.socketpair()
        outcomes = await asyncio.gather(
            server_handshake(ours, server), client_handshake(theirs, kept, "localhost"), return_exceptions=True
        )
        assert all(isinstance(outcome, StillpointError) for outcome in outcomes)

    run(story())


def test_grpc_takes_renewed_certificates_on_both_sides_and_cuts_no_call(pki: TestPki) -> None:
    server_folder, client_folder = pki.issue(Role.DATA), pki.issue(Role.ADMIN)
    seen: list[int] = []

    async def story() -> None:
        server = await serve_grpc(Address("127.0.0.1", 0), lambda _: None, [], Credentials(server_folder))
        address = Address("127.0.0.1", server.address.port)

        async def shown() -> int:
            """The certificate that the gRPC server shows to a new connection."""
            context = pki.credentials(Role.ADMIN).client_context()
            context.set_alpn_protocols(["h2"])
            reader, writer = await asyncio.open_connection("127.0.0.1", address.port, ssl=context)
            certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            del reader
            return x509.load_der_x509_certificate(certificate).serial_number

        async with open_channel(address, Credentials(client_folder)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watching = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
            seen.append(await shown())
            after = renew(pki, server_folder, Identity(Role.DATA, "data1"))
            renew(pki, client_folder, Identity(Role.ADMIN, "admin1"))
            seen.append(await shown())
            assert seen[1] == after != seen[0]
            await stub.Check(health_pb2.HealthCheckRequest())  # by a new connection, with the new certificate
            await server.set_serving("", False)
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watching.cancel()
        await server.stop(grace_s=0)

    with asyncio.Runner() as runner:
        runner.run(asyncio.wait_for(story(), 30))


def test_a_client_whose_certificate_was_renewed_in_time_outlives_the_old_one(tmp_path: Path) -> None:
    """The old one is replaced by one of another authority, which the server trusts by then: only new files get in."""
    pki = TestPki(tmp_path / "old")
    server_folder, client_folder = pki.issue(Role.DATA), pki.issue(Role.ADMIN)

    async def story() -> None:
        server = await serve_grpc(Address("127.0.0.1", 0), lambda _: None, [], Credentials(server_folder))
        async with open_channel(Address("127.0.0.1", server.address.port), Credentials(client_folder)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest())
            fresh = Authority.create(tmp_path / "new")
            for folder, role in ((server_folder, Role.DATA), (client_folder, Role.ADMIN)):
                shutil.rmtree(folder)
                fresh.issue(Identity(role, "x"), folder, hosts=LOOPBACK if role.serves else ())
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        await server.stop(grace_s=0)

    with asyncio.Runner() as runner:
        runner.run(asyncio.wait_for(story(), 30))
