"""NBD over TLS: who gets in, what is forgotten, and every way to get around it that is known."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop

from stillpoint.config import NbdTls
from stillpoint.devices import MemoryDevice
from stillpoint.errors import (
    ConfigError,
    InvalidRequest,
    NotFound,
    PeerUnavailable,
    PermissionRefused,
    ProtocolError,
    StillpointError,
)
from stillpoint.nbd import codec
from stillpoint.nbd import constants as c
from stillpoint.nbd.access import Access
from stillpoint.nbd.client import NbdClient
from stillpoint.nbd.export import DeviceExport
from stillpoint.nbd.listen import listen_tcp
from stillpoint.nbd.server import NbdServer
from stillpoint.security.authorization import EXPORTS, Exports
from stillpoint.security.roles import Role
from stillpoint.tls import Credentials
from tests.support.nbd import RawClient, ServerThread
from tests.support.pki import TestPki

SIZE = 16 << 20
ACK = c.OptionReplyKind.ACK
OPTIONS = [option for option in c.Option if option not in (c.Option.STARTTLS, c.Option.ABORT, c.Option.EXPORT_NAME)]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> TestPki:
    return TestPki(tmp_path_factory.mktemp("pki"))


@contextlib.contextmanager
def serving(pki: TestPki, mode: NbdTls, *, handshake_timeout_s: float = 10.0) -> Iterator[ServerThread]:
    access = Access(pki.credentials(Role.DATA), mode, EXPORTS[Exports.VOLUMES])
    with ServerThread(access=access, handshake_timeout_s=handshake_timeout_s) as server:
        device = MemoryDevice(SIZE)
        server.exports["vol1"] = DeviceExport("vol1", device, server.executor)
        yield server
        assert server.stop()
        assert server.server.connection_count == 0
        assert server.budget.free == server.budget.limit
        device.close()


@pytest.fixture
def strict(pki: TestPki) -> Iterator[ServerThread]:
    with serving(pki, NbdTls.REQUIRE) as server:
        yield server


@pytest.fixture
def lenient(pki: TestPki) -> Iterator[ServerThread]:
    with serving(pki, NbdTls.ALLOW) as server:
        yield server


@pytest.fixture
def context(pki: TestPki) -> ssl.SSLContext:
    return pki.credentials(Role.CLIENT).client_context()


def uri(server: ServerThread, certificates: Path, *, host: str = "localhost") -> str:
    return f"nbds://{host}:{server.port}/vol1?tls-certificates={certificates}"


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work, 30))


def still_serves(server: ServerThread, pki: TestPki) -> None:
    async def look() -> None:
        async with await NbdClient.connect(uri(server, pki.issue(Role.CLIENT))) as client:
            assert client.size == SIZE

    run(look())


# --- getting in


@pytest.mark.parametrize("length", [1, 4096, 16_384, 70_000, 3 << 20, 16 << 20])
def test_data_of_every_size_goes_out_and_back_over_tls(strict: ServerThread, pki: TestPki, length: int) -> None:
    data = random.Random(length).randbytes(length)

    async def story() -> None:
        async with await NbdClient.connect(uri(strict, pki.issue(Role.CLIENT))) as client:
            await client.write(SIZE - length, data)
            await client.flush()
            assert await client.read(SIZE - length, length) == data
            assert client.export.structured and client.export.allocation_id is not None

    run(story())


def test_many_requests_at_once_keep_to_their_places_over_tls(strict: ServerThread, pki: TestPki) -> None:
    seed = 7
    source = random.Random(seed)
    blocks = [source.randbytes(4096 * source.randint(1, 64)) for _ in range(60)]

    async def story() -> None:
        async with await NbdClient.connect(uri(strict, pki.issue(Role.ADMIN))) as client:
            places = [number * (256 << 10) for number in range(len(blocks))]
            await asyncio.gather(*(client.write(at, block) for at, block in zip(places, blocks, strict=True)))
            back = await asyncio.gather(
                *(client.read(at, len(block)) for at, block in zip(places, blocks, strict=True))
            )
            assert back == blocks, f"seed {seed}"

    run(story())


def test_tls_is_offered_beside_plaintext_where_plaintext_is_allowed(
    lenient: ServerThread, pki: TestPki, context: ssl.SSLContext
) -> None:
    still_serves(lenient, pki)
    with RawClient(lenient.port) as client:
        client.go("vol1")
    with RawClient(lenient.port) as client:
        client.greet()
        client.start_tls(context)
        assert client.answer(c.Option.GO, codec.GoRequest("vol1").encode()) == ACK


# --- before TLS


def test_where_tls_is_required_nothing_else_is_answered_in_plaintext(strict: ServerThread) -> None:
    with RawClient(strict.port) as client:
        client.greet()
        for option in [*OPTIONS, 99]:
            replies = client.option(option, codec.GoRequest("vol1").encode())
            assert [reply.kind for reply in replies] == [c.OptionReplyKind.ERR_TLS_REQD], option
        assert client.answer(c.Option.ABORT) == ACK
        assert client.is_closed()


def test_where_tls_is_required_export_name_ends_the_connection(strict: ServerThread, pki: TestPki) -> None:
    for name in (b"vol1", b"no such"):
        with RawClient(strict.port) as client:
            client.greet()
            client.send(codec.OptionRequest(c.Option.EXPORT_NAME, name).encode())
            assert client.is_closed()
    still_serves(strict, pki)


def test_a_server_without_certificates_does_not_know_starttls() -> None:
    with ServerThread() as server, RawClient(server.port) as client:
        client.greet()
        assert client.answer(c.Option.STARTTLS) == c.OptionReplyKind.ERR_UNSUP


def test_starttls_takes_no_payload(strict: ServerThread) -> None:
    with RawClient(strict.port) as client:
        client.greet()
        assert client.answer(c.Option.STARTTLS, b"x") == c.OptionReplyKind.ERR_INVALID
        assert client.answer(c.Option.LIST) == c.OptionReplyKind.ERR_TLS_REQD


@pytest.mark.parametrize(
    "injected",
    [
        codec.OptionRequest(c.Option.GO, codec.GoRequest("vol1").encode()).encode(),
        codec.OptionRequest(c.Option.ABORT).encode(),
        b"\0",
        # More than one reception of the server takes.
        codec.OptionRequest(c.Option.LIST).encode() * 40_000,
    ],
    ids=["an option", "an end", "a byte", "a flood"],
)
@pytest.mark.parametrize("mode", [NbdTls.REQUIRE, NbdTls.ALLOW])
def test_what_comes_in_plaintext_behind_starttls_is_never_read(
    pki: TestPki, context: ssl.SSLContext, mode: NbdTls, injected: bytes
) -> None:
    with serving(pki, mode) as server:
        with RawClient(server.port) as client:
            client.greet()
            answered = b""
            try:
                client.send(codec.OptionRequest(c.Option.STARTTLS).encode() + injected)
                while part := client.socket.recv(65536):
                    answered += part
            except ConnectionError:
                pass
            # At most the answer to STARTTLS itself, and perhaps an alert of TLS.
            ack = codec.OptionReply(c.Option.STARTTLS, ACK).encode()
            assert answered[: len(ack)] in (ack, b"") and len(answered) <= len(ack) + 16
        still_serves(server, pki)


def test_what_comes_in_plaintext_after_the_answer_to_starttls_is_never_read(strict: ServerThread, pki: TestPki) -> None:
    with RawClient(strict.port) as client:
        client.greet()
        assert client.answer(c.Option.STARTTLS) == ACK
        client.send(codec.OptionRequest(c.Option.GO, codec.GoRequest("vol1").encode()).encode())
        with pytest.raises(ConnectionError):
            client.receive(64)
    still_serves(strict, pki)


def test_nothing_that_was_negotiated_in_plaintext_holds_within_tls(
    lenient: ServerThread, context: ssl.SSLContext
) -> None:
    query = codec.MetaContextRequest("vol1", (c.BASE_ALLOCATION,)).encode()
    with RawClient(lenient.port) as client:
        client.greet()
        assert client.answer(c.Option.STRUCTURED_REPLY) == ACK
        assert client.answer(c.Option.SET_META_CONTEXT, query) == ACK
        client.start_tls(context)
        assert client.answer(c.Option.SET_META_CONTEXT, query) == c.OptionReplyKind.ERR_INVALID
        info, *_ = client.option(c.Option.GO, codec.GoRequest("vol1").encode())
        told = codec.parse_info(info.payload)
        assert isinstance(told, codec.ExportInfo) and not told.flags & c.ExportFlag.SEND_DF
        assert client.ask(c.Command.BLOCK_STATUS, 0, 4096) == c.Errno.EINVAL
        cookie = client.request(c.Command.READ, 0, 512)
        assert codec.decode_reply(memoryview(client.receive(16))) == (codec.SimpleReply(0, cookie), 16)


def test_starttls_within_tls_is_invalid_and_changes_nothing(strict: ServerThread, context: ssl.SSLContext) -> None:
    with RawClient(strict.port) as client:
        client.greet()
        client.start_tls(context)
        assert client.answer(c.Option.STARTTLS) == c.OptionReplyKind.ERR_INVALID
        assert client.answer(c.Option.GO, codec.GoRequest("vol1").encode()) == ACK


# --- who is refused


@pytest.mark.parametrize("kind", ["expired", "server_only", "of_other_authority"])
def test_a_certificate_that_does_not_hold_is_refused_and_logged(
    strict: ServerThread, pki: TestPki, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = getattr(pki, kind)(Role.CLIENT)

    async def story() -> None:
        with pytest.raises((PermissionRefused, PeerUnavailable)) as caught:
            await NbdClient.connect(uri(strict, folder))
        assert "nbds://localhost" in str(caught.value)

    with caplog.at_level(logging.WARNING):
        run(story())
        still_serves(strict, pki)
    assert [line for line in caplog.records if "refused" in line.getMessage() and "127.0.0.1" in line.__dict__["peer"]]


def test_tls_without_a_certificate_is_refused_and_logged(
    strict: ServerThread, pki: TestPki, caplog: pytest.LogCaptureFixture
) -> None:
    bare = ssl.create_default_context(cadata=pki.credentials(Role.CLIENT).files.authority.decode())
    with caplog.at_level(logging.WARNING), RawClient(strict.port) as client:
        client.greet()

        # In TLS 1.3 the client's side is complete before the server has looked for a certificate.
        def ask() -> None:
            client.start_tls(bare)
            client.option(c.Option.LIST)

        with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|EOF"):
            ask()
        still_serves(strict, pki)
    assert any("peer did not return a certificate" in line.getMessage() for line in caplog.records)


def test_a_role_that_may_not_open_volumes_is_told_so_whatever_it_asks(
    strict: ServerThread, pki: TestPki, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for credentials in (pki.credentials(Role.BACKUP), pki.credentials(Role.DATA), Credentials(pki.without_role())):
            with RawClient(strict.port) as client:
                client.greet()
                client.start_tls(credentials.client_context())
                for option in [*OPTIONS, c.Option.STARTTLS]:
                    replies = client.option(option, codec.GoRequest("vol1").encode())
                    assert [reply.kind for reply in replies] == [c.OptionReplyKind.ERR_POLICY], option
                client.send(codec.OptionRequest(c.Option.EXPORT_NAME, b"vol1").encode())
                assert client.is_closed()
    named = [line.__dict__["peer"].partition(" at ")[0] for line in caplog.records if "role" in line.getMessage()]
    assert named == ["backup:backup1", "data:data1", "unknown"]


def test_each_kind_of_export_lets_in_the_roles_of_the_table(pki: TestPki) -> None:
    found: dict[Exports, set[Role]] = {kind: set() for kind in Exports}
    for kind in Exports:
        with ServerThread(access=Access(pki.credentials(Role.DATA), NbdTls.REQUIRE, EXPORTS[kind])) as server:
            server.exports["x"] = DeviceExport("x", MemoryDevice(4096), server.executor)
            for role in Role:
                with RawClient(server.port) as client:
                    client.greet()
                    client.start_tls(pki.credentials(role).client_context())
                    if client.answer(c.Option.GO, codec.GoRequest("x").encode()) == ACK:
                        found[kind].add(role)
    assert found == EXPORTS


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", bytes(300)], ids=["nothing", "a beginning", "rubbish"])
def test_a_tls_handshake_that_never_ends_is_ended(pki: TestPki, sent: bytes) -> None:
    with serving(pki, NbdTls.REQUIRE, handshake_timeout_s=0.5) as server:
        with RawClient(server.port) as client:
            client.greet()
            assert client.answer(c.Option.STARTTLS) == ACK
            client.send(sent)
            began = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                while client.socket.recv(4096):
                    pass
            assert time.monotonic() - began < 5
        still_serves(server, pki)


def test_a_server_that_stops_waits_for_no_tls_handshake(pki: TestPki) -> None:
    with serving(pki, NbdTls.REQUIRE) as server:
        with RawClient(server.port) as client:
            client.greet()
            assert client.answer(c.Option.STARTTLS) == ACK
            assert server.stop(1.0)
            assert client.is_closed()


# --- listening


def test_plaintext_is_never_offered_to_other_machines_by_oversight(pki: TestPki) -> None:
    credentials = pki.credentials(Role.DATA)

    async def ask(access: Access | None) -> int:
        with ThreadPoolExecutor(1) as executor:
            server = NbdServer({}, executor, access=access)
            with listen_tcp("0.0.0.0", 0) as listener:
                server.listen([listener])
                try:
                    return await asyncio.to_thread(lists, listener.getsockname()[1])
                finally:
                    await server.stop()

    def lists(port: int) -> int:
        with RawClient(port) as client:
            client.greet()
            return client.answer(c.Option.LIST)

    assert (
        asyncio.run(ask(Access(credentials, NbdTls.AUTO, EXPORTS[Exports.VOLUMES]))) == c.OptionReplyKind.ERR_TLS_REQD
    )
    assert asyncio.run(ask(Access(credentials, NbdTls.ALLOW, EXPORTS[Exports.VOLUMES]))) == ACK
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*there are no certificates"):
        asyncio.run(ask(None))


# --- our client


Lie = Callable[[socket.socket], None]


def greet(sock: socket.socket) -> None:
    sock.sendall(codec.Greeting(3).encode())
    sock.recv(4)
    sock.recv(16)


def refuses(sock: socket.socket) -> None:
    greet(sock)
    sock.sendall(codec.OptionReply(c.Option.STARTTLS, c.OptionReplyKind.ERR_UNSUP).encode())


def answers_another_option(sock: socket.socket) -> None:
    greet(sock)
    sock.sendall(codec.OptionReply(c.Option.STRUCTURED_REPLY, ACK).encode())


def sends_more_before_tls(sock: socket.socket) -> None:
    greet(sock)
    extra = codec.OptionReply(c.Option.STRUCTURED_REPLY, ACK).encode()
    sock.sendall(codec.OptionReply(c.Option.STARTTLS, ACK).encode() + extra)


def speaks_no_tls(sock: socket.socket) -> None:
    greet(sock)
    sock.sendall(codec.OptionReply(c.Option.STARTTLS, ACK).encode())
    sock.recv(4096)
    sock.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")


def goes(sock: socket.socket) -> None:
    greet(sock)
    sock.sendall(codec.OptionReply(c.Option.STARTTLS, ACK).encode())


@pytest.mark.parametrize(
    ("lie", "error", "says"),
    [
        (refuses, PermissionRefused, "offers no TLS"),
        (answers_another_option, ProtocolError, "instead of STARTTLS"),
        (sends_more_before_tls, ProtocolError, "before TLS had begun"),
        (speaks_no_tls, PermissionRefused, "TLS refused"),
        (goes, StillpointError, "TLS"),
    ],
)
def test_a_client_that_wants_tls_never_goes_on_without(
    pki: TestPki, lie: Lie, error: type[Exception], says: str
) -> None:
    heard = bytearray()

    def serve(listener: socket.socket) -> None:
        listener.settimeout(10)
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(10)
            lie(sock)
            with contextlib.suppress(OSError):  # the client may have gone already
                sock.shutdown(socket.SHUT_WR)
                while data := sock.recv(4096):
                    heard.extend(data)

    async def story(listener: socket.socket) -> None:
        serving = asyncio.create_task(asyncio.to_thread(serve, listener))
        port = listener.getsockname()[1]
        with pytest.raises(error, match=says):
            await NbdClient.connect(f"nbds://localhost:{port}/vol1?tls-certificates={pki.issue(Role.CLIENT)}")
        await serving

    with listen_tcp("127.0.0.1", 0) as listener:
        run(story(listener))
    assert codec.OptionRequest(c.Option.GO).encode()[:12] not in heard and b"vol1" not in heard


@pytest.mark.parametrize("kind", ["another host", "a client's certificate", "another authority", "expired"])
def test_a_client_checks_the_server(tmp_path: Path, kind: str) -> None:
    pki = TestPki(tmp_path)
    folder = {
        "another host": lambda: pki.issue(Role.DATA, "elsewhere", hosts=("example.org",)),
        "a client's certificate": lambda: pki.issue(Role.CLIENT, "pretender"),
        "another authority": lambda: pki.of_other_authority(Role.DATA),
        "expired": lambda: pki.expired(Role.DATA),
    }[kind]()

    async def story() -> None:
        with pytest.raises(PermissionRefused, match="TLS refused"):
            await NbdClient.connect(uri(server, pki.issue(Role.CLIENT)))

    access = Access(Credentials(folder), NbdTls.REQUIRE, EXPORTS[Exports.VOLUMES])
    with ServerThread(access=access) as server:
        run(story())


def test_a_uri_that_asks_for_tls_names_certificates_and_one_that_does_not_names_none(strict: ServerThread) -> None:
    async def connect(text: str) -> None:
        await NbdClient.connect(text)

    with pytest.raises(InvalidRequest, match="add \\?tls-certificates=FOLDER"):
        run(connect(f"nbds://localhost:{strict.port}/vol1"))
    with pytest.raises(InvalidRequest, match="nbds:// is what asks for TLS"):
        run(connect(f"nbd://localhost:{strict.port}/vol1?tls-certificates=/tmp"))
    with pytest.raises(PermissionRefused, match="wants TLS"):
        run(connect(f"nbd://localhost:{strict.port}/vol1"))


def test_an_export_that_is_not_there_is_not_there_over_tls_either(strict: ServerThread, pki: TestPki) -> None:
    async def story() -> None:
        with pytest.raises(NotFound):
            await NbdClient.connect(uri(strict, pki.issue(Role.CLIENT)).replace("/vol1", "/vol2"))

    run(story())
