"""The handshake without a socket: what may be asked when, and what is answered."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from stillpoint.devices import MemoryDevice
from stillpoint.errors import NotFound, PermissionRefused, ProtocolError
from stillpoint.nbd import client_session, codec
from stillpoint.nbd.client_session import ClientSession
from stillpoint.nbd.constants import ExportFlag, Info, Option, OptionReplyKind
from stillpoint.nbd.contexts import ChangedFunction
from stillpoint.nbd.export import DeviceExport
from stillpoint.nbd.session import ServerSession, State

SIZE = 1 << 20
ACK = OptionReplyKind.ACK
INVALID = OptionReplyKind.ERR_INVALID
UNSUP = OptionReplyKind.ERR_UNSUP
UNKNOWN = OptionReplyKind.ERR_UNKNOWN


@pytest.fixture
def exports() -> Iterator[dict[str, DeviceExport]]:
    with ThreadPoolExecutor(1) as executor:
        devices = {name: MemoryDevice(SIZE, name=name) for name in ("vol1", "vol1@s1")}
        yield {
            "vol1": DeviceExport("vol1", devices["vol1"], executor, description="the first"),
            "vol1@s1": DeviceExport("vol1@s1", devices["vol1@s1"], executor, read_only=True),
        }
        for device in devices.values():
            device.close()


@pytest.fixture
def session(exports: dict[str, DeviceExport]) -> ServerSession:
    session = ServerSession(exports)
    assert codec.decode_greeting(memoryview(session.output())) == (codec.Greeting(3), 18)
    assert session.receive(memoryview(codec.ClientFlags(3).encode())) == 4
    return session


def replies(session: ServerSession) -> list[codec.OptionReply]:
    found = []
    data = memoryview(session.output())
    while data:
        decoded = codec.decode_option_reply(data)
        assert decoded is not None
        found.append(decoded[0])
        data = data[decoded[1] :]
    return found


def ask(session: ServerSession, option: int, payload: bytes = b"") -> list[codec.OptionReply]:
    wire = codec.OptionRequest(option, payload).encode()
    assert session.receive(memoryview(wire + b"trailing")) == len(wire)
    return replies(session)


GO_VOL1 = codec.GoRequest("vol1").encode()
META_VOL1 = codec.MetaContextRequest("vol1", ("base:allocation",)).encode()


@pytest.mark.parametrize(
    ("option", "payload", "plain", "structured"),
    [
        (Option.LIST, b"", ACK, ACK),
        (Option.LIST, b"x", INVALID, INVALID),
        (Option.INFO, GO_VOL1, ACK, ACK),
        (Option.INFO, codec.GoRequest("missing").encode(), UNKNOWN, UNKNOWN),
        (Option.INFO, codec.GoRequest("../../etc/passwd").encode(), UNKNOWN, UNKNOWN),
        (Option.INFO, GO_VOL1 + b"x", INVALID, INVALID),
        (Option.GO, GO_VOL1, ACK, ACK),
        (Option.GO, b"", INVALID, INVALID),
        (Option.GO, codec.GoRequest("").encode(), UNKNOWN, UNKNOWN),
        (Option.GO, b"\0\0\0\x04vo\0l\0\0", INVALID, INVALID),
        (Option.GO, b"\0\0\0\x02\xff\xfe\0\0", INVALID, INVALID),
        (Option.STRUCTURED_REPLY, b"", ACK, ACK),
        (Option.STRUCTURED_REPLY, b"x", INVALID, INVALID),
        (Option.LIST_META_CONTEXT, META_VOL1, INVALID, ACK),
        (Option.SET_META_CONTEXT, META_VOL1, INVALID, ACK),
        (Option.SET_META_CONTEXT, META_VOL1[:-1], INVALID, INVALID),
        (Option.SET_META_CONTEXT, codec.MetaContextRequest("missing").encode(), INVALID, UNKNOWN),
        (Option.STARTTLS, b"", UNSUP, UNSUP),
        (11, b"", UNSUP, UNSUP),
        (0xFFFFFFFF, b"anything", UNSUP, UNSUP),
        (Option.ABORT, b"", ACK, ACK),
    ],
)
def test_each_option_in_each_state(
    exports: dict[str, DeviceExport],
    option: int,
    payload: bytes,
    plain: OptionReplyKind,
    structured: OptionReplyKind,
) -> None:
    for before, wanted in (([], plain), ([Option.STRUCTURED_REPLY], structured)):
        session = ServerSession(exports)
        session.receive(memoryview(codec.ClientFlags(3).encode()))
        session.output()
        for earlier in before:
            ask(session, earlier)
        assert ask(session, option, payload)[-1].kind == wanted


def test_the_list_names_every_export(session: ServerSession) -> None:
    entries = [codec.ServerEntry.parse(reply.payload) for reply in ask(session, Option.LIST)[:-1]]
    assert entries == [codec.ServerEntry("vol1", "the first"), codec.ServerEntry("vol1@s1")]


def test_info_tells_what_was_asked_and_stays_in_the_handshake(session: ServerSession) -> None:
    wanted = codec.GoRequest("vol1", (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 77))
    infos = [codec.parse_info(reply.payload) for reply in ask(session, Option.INFO, wanted.encode())[:-1]]
    assert isinstance(infos[0], codec.ExportInfo)
    assert infos[0].size == SIZE
    assert infos[1:] == [
        codec.TextInfo(Info.NAME, "vol1"),
        codec.TextInfo(Info.DESCRIPTION, "the first"),
        codec.BlockSizeInfo(1, 4096, 32 << 20),
    ]
    assert session.state is State.PLAIN


def test_flags_say_what_the_export_can_do(session: ServerSession) -> None:
    def flags(name: str) -> ExportFlag:
        info = codec.parse_info(ask(session, Option.INFO, codec.GoRequest(name).encode())[0].payload)
        assert isinstance(info, codec.ExportInfo)
        return ExportFlag(info.flags)

    writable = ExportFlag.SEND_FUA | ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES
    common = ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH | ExportFlag.SEND_CACHE | ExportFlag.CAN_MULTI_CONN
    assert flags("vol1") == common | writable
    assert flags("vol1@s1") == common | ExportFlag.READ_ONLY
    ask(session, Option.STRUCTURED_REPLY)
    assert flags("vol1") == common | writable | ExportFlag.SEND_DF


def test_contexts_hold_only_for_the_export_they_were_set_for(exports: dict[str, DeviceExport]) -> None:
    for chosen, wanted in (("vol1", (codec.MetaContext(1, "base:allocation"),)), ("vol1@s1", ())):
        session = ServerSession(exports)
        session.receive(memoryview(codec.ClientFlags(3).encode()))
        session.output()
        ask(session, Option.STRUCTURED_REPLY)
        ask(session, Option.SET_META_CONTEXT, META_VOL1)
        ask(session, Option.GO, codec.GoRequest(chosen).encode())
        assert session.agreement is not None
        assert session.agreement.contexts == wanted
        assert session.agreement.export is exports[chosen]


def test_a_failed_set_of_contexts_leaves_none(session: ServerSession) -> None:
    ask(session, Option.STRUCTURED_REPLY)
    ask(session, Option.SET_META_CONTEXT, META_VOL1)
    ask(session, Option.SET_META_CONTEXT, META_VOL1[:-1])
    ask(session, Option.GO, GO_VOL1)
    assert session.agreement is not None
    assert session.agreement.contexts == ()


@pytest.mark.parametrize(
    ("queries", "listed"),
    [((), 1), (("base:",), 1), (("base:allocation",), 1), (("qemu:",), 0), (("base:alloc",), 0), (("",), 0)],
)
def test_contexts_are_listed_by_name_or_namespace(
    session: ServerSession, queries: tuple[str, ...], listed: int
) -> None:
    ask(session, Option.STRUCTURED_REPLY)
    answers = ask(session, Option.LIST_META_CONTEXT, codec.MetaContextRequest("vol1", queries).encode())
    assert [reply.kind for reply in answers] == [OptionReplyKind.META_CONTEXT] * listed + [ACK]


@pytest.mark.parametrize("flags", [0, 2, 4, 7, 0xFFFFFFFF])
def test_unknown_client_flags_end_it(exports: dict[str, DeviceExport], flags: int) -> None:
    with pytest.raises(ProtocolError):
        ServerSession(exports).receive(memoryview(codec.ClientFlags(flags).encode()))


@pytest.mark.parametrize(("client_flags", "length"), [(3, 10), (1, 134)])
def test_export_name_answers_with_size_and_zeroes_unless_waived(
    exports: dict[str, DeviceExport], client_flags: int, length: int
) -> None:
    session = ServerSession(exports)
    session.receive(memoryview(codec.ClientFlags(client_flags).encode()))
    session.output()
    wire = codec.OptionRequest(Option.EXPORT_NAME, b"vol1").encode()
    assert session.receive(memoryview(wire)) == len(wire)
    output = session.output()
    assert len(output) == length
    assert int.from_bytes(output[:8], "big") == SIZE
    assert session.state is State.TRANSMISSION


@pytest.mark.parametrize("name", [b"missing", b"\xff", b"vol1\0", b"n" * 5000])
def test_export_name_has_no_error_reply_so_a_bad_one_ends_it(session: ServerSession, name: bytes) -> None:
    with pytest.raises(ProtocolError):
        session.receive(memoryview(codec.OptionRequest(Option.EXPORT_NAME, name).encode()))


def test_too_many_options_end_it(session: ServerSession) -> None:
    for _ in range(256):
        ask(session, 1000)
    with pytest.raises(ProtocolError):
        ask(session, 1000)


def test_nothing_is_read_after_the_end_of_the_handshake(session: ServerSession) -> None:
    ask(session, Option.GO, GO_VOL1)
    assert session.state is State.TRANSMISSION
    assert session.receive(memoryview(codec.OptionRequest(Option.LIST).encode())) == 0
    assert session.output() == b""


def test_an_error_never_echoes_the_name(session: ServerSession) -> None:
    reply = ask(session, Option.INFO, codec.GoRequest("n" * 4096).encode())[-1]
    assert reply.kind == UNKNOWN
    assert len(reply.payload) < 100


# --- the client's session


def converse(client: ClientSession, server: ServerSession, *, step: int) -> None:
    """Carry bytes both ways, at most `step` at a time, until nothing moves."""
    to_client, to_server = bytearray(), bytearray()
    inboxes = (bytearray(), bytearray())
    moved = True
    while moved:
        to_client += server.output()
        to_server += client.output()
        moved = False
        for wire, inbox, side in ((to_client, inboxes[0], client), (to_server, inboxes[1], server)):
            inbox += wire[:step]
            moved = moved or bool(wire)
            del wire[:step]
            while consumed := side.receive(memoryview(bytes(inbox))):
                del inbox[:consumed]
                moved = True


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_client_and_server_agree_however_their_bytes_are_cut(exports: dict[str, DeviceExport], step: int) -> None:
    client, server = ClientSession("vol1"), ServerSession(exports)
    converse(client, server, step=step)
    assert client.state is client_session.State.READY
    assert server.state is State.TRANSMISSION
    assert client.description is not None
    assert (client.description.size, client.description.allocation_id) == (SIZE, 1)
    assert client.description.structured


def test_a_missing_export_is_named(exports: dict[str, DeviceExport]) -> None:
    with pytest.raises(NotFound, match="'missing'"):
        converse(ClientSession("missing"), ServerSession(exports), step=1000)


def reply(option: Option, kind: int, payload: bytes = b"") -> bytes:
    return codec.OptionReply(option, kind, payload).encode()


GREETING = codec.Greeting(3).encode()
NO_STRUCTURE = reply(Option.STRUCTURED_REPLY, UNSUP)
EXPORT = codec.ExportInfo(SIZE, 1).encode()


def feed(client: ClientSession, data: bytes) -> None:
    rest = memoryview(data)
    while consumed := client.receive(rest):
        rest = rest[consumed:]


def test_a_plain_server_is_good_enough() -> None:
    client = ClientSession("x")
    feed(client, GREETING + NO_STRUCTURE + reply(Option.GO, OptionReplyKind.INFO, EXPORT) + reply(Option.GO, ACK))
    assert client.description is not None
    assert not client.description.structured
    assert client.description.allocation_id is None


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (codec.Greeting(0).encode(), ProtocolError),
        (GREETING + reply(Option.GO, ACK), ProtocolError),
        (GREETING + reply(Option.STRUCTURED_REPLY, OptionReplyKind.ERR_TLS_REQD), PermissionRefused),
        (GREETING + NO_STRUCTURE + reply(Option.GO, ACK), ProtocolError),
        (GREETING + NO_STRUCTURE + reply(Option.GO, OptionReplyKind.ERR_POLICY), PermissionRefused),
        (GREETING + NO_STRUCTURE + reply(Option.GO, UNSUP), ProtocolError),
        (GREETING + NO_STRUCTURE + reply(Option.GO, OptionReplyKind.INFO, b"\0"), ProtocolError),
        (GREETING + NO_STRUCTURE + reply(Option.GO, OptionReplyKind.INFO, EXPORT) * 100, ProtocolError),
        (
            GREETING
            + NO_STRUCTURE
            + reply(Option.GO, OptionReplyKind.INFO, EXPORT)
            + reply(Option.GO, OptionReplyKind.INFO, codec.BlockSizeInfo(0, 0, 0).encode())
            + reply(Option.GO, ACK),
            ProtocolError,
        ),
    ],
)
def test_servers_that_make_no_sense_are_left(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        feed(ClientSession("x"), data)


class _Remembering(DeviceExport):
    """An export with two earlier instants."""

    def bases(self) -> list[str]:
        return ["monday", "tuesday"]

    def changed_since(self, base: str, /) -> ChangedFunction:
        if base not in self.bases():
            raise NotFound(base)
        return lambda offset, length: iter([(length, base == "monday")])


@pytest.fixture
def remembering() -> Iterator[ServerSession]:
    with ThreadPoolExecutor(1) as executor:
        device = MemoryDevice(SIZE)
        session = ServerSession({"vol1@s2": _Remembering("vol1@s2", device, executor, read_only=True)})
        session.receive(memoryview(codec.ClientFlags(3).encode()))
        session.output()
        ask(session, Option.STRUCTURED_REPLY)
        yield session
        device.close()


@pytest.mark.parametrize(
    ("query", "listed"),
    [("qemu:", 2), ("qemu:dirty-bitmap:", 2), ("qemu:dirty-bitmap:monday", 1), ("qemu:dirty-bitmap:mon", 0)],
)
def test_bitmaps_are_listed_by_any_beginning_that_ends_with_a_colon(
    remembering: ServerSession, query: str, listed: int
) -> None:
    answers = ask(remembering, Option.LIST_META_CONTEXT, codec.MetaContextRequest("vol1@s2", (query,)).encode())
    assert [reply.kind for reply in answers] == [OptionReplyKind.META_CONTEXT] * listed + [ACK]


def test_an_export_offers_the_bitmaps_it_has_and_leaves_out_the_others(remembering: ServerSession) -> None:
    names = ("qemu:dirty-bitmap:monday", "base:allocation", "qemu:dirty-bitmap:never", "qemu:dirty-bitmap:monday")
    ask(remembering, Option.SET_META_CONTEXT, codec.MetaContextRequest("vol1@s2", names).encode())
    ask(remembering, Option.GO, codec.GoRequest("vol1@s2").encode())
    agreement = remembering.agreement
    assert agreement is not None
    assert [context.name for context in agreement.contexts] == ["qemu:dirty-bitmap:monday", "base:allocation"]
    assert [list(status(0, SIZE)) for status in agreement.status] == [[(SIZE, 1)], [(SIZE, 3)]]
