"""The server's side of the NBD handshake: bytes of options in, bytes of answers out. No I/O.

Invariants
- What may be asked when is the table `_OPTIONS`; an option that has no entry in the present state is answered and
  changes nothing.
- An export is found by looking its name up in the directory. A name is never a path, and never echoed.
- After a ProtocolError, or in ENDED, nothing more is read.
- TLS forgets everything that was agreed before it. Nothing is read between the answer to STARTTLS and the handshake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from ..errors import NotFound, ProtocolError
from .access import StartTls
from .codec import (
    BadOption,
    BlockSizeInfo,
    ExportInfo,
    ExportNameReply,
    GoRequest,
    Greeting,
    MetaContext,
    MetaContextRequest,
    OptionReply,
    OptionRequest,
    ServerEntry,
    TextInfo,
    decode_client_flags,
    decode_option,
    parse_export_name,
)
from .constants import ExportFlag, HandshakeFlag, Info, Option, OptionReplyKind
from .contexts import StatusFunction, context_names, matches, status_function
from .export import Export

# A plain number: the complement of an IntFlag holds only the flags it has names for.
_HANDSHAKE_FLAGS: Final = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_OPTION_COUNT_MAX: Final = 256


class State(Enum):
    CLIENT_FLAGS = auto()
    TLS_FIRST = auto()
    """Options, of which none but STARTTLS is any use yet."""
    STARTING_TLS = auto()
    """The client was told to begin; `secured` follows."""
    FORBIDDEN = auto()
    """Options of a client whose certificate may not open these exports."""
    PLAIN = auto()
    """Options, before structured replies were agreed."""
    STRUCTURED = auto()
    """Options, with structured replies."""
    TRANSMISSION = auto()
    """An export was chosen; what follows are requests."""
    ENDED = auto()
    """The client gave up; the connection is to be closed once the answers are sent."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What both sides settled on."""

    export: Export
    structured: bool
    contexts: tuple[MetaContext, ...]
    status: tuple[StatusFunction, ...]
    """What answers for each of `contexts`."""


class ServerSession:
    """One client's handshake. Send `output` after each `receive`; in state TRANSMISSION see `agreement`."""

    def __init__(self, exports: Mapping[str, Export], starttls: StartTls = StartTls.UNAVAILABLE) -> None:
        self.state = State.CLIENT_FLAGS
        self._starttls = starttls
        self._is_secured = False
        # Whether something was asked in plaintext that only TLS would have been answered for.
        self.was_refused = False
        self.agreement: Agreement | None = None
        self._exports = exports
        self._zeroes = True
        self._option_count = 0
        self._contexts_of: Export | None = None
        self._contexts: tuple[MetaContext, ...] = ()
        self._status: tuple[StatusFunction, ...] = ()
        self._output = bytearray(Greeting(_HANDSHAKE_FLAGS).encode())

    def output(self) -> bytes:
        """The bytes to send now; they are handed out once."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def receive(self, data: memoryview) -> int:
        """Take one message from the start of `data`; returns its size, 0 when it is not complete.

        Raises ProtocolError when the client is to be cut off.
        """
        if self.state is State.CLIENT_FLAGS:
            return self._receive_flags(data)
        if self.state not in _OPTIONS:
            return 0
        decoded = decode_option(data)
        if decoded is None:
            return 0
        request, size = decoded
        self._option_count += 1
        if self._option_count > _OPTION_COUNT_MAX:
            raise ProtocolError(f"more than {_OPTION_COUNT_MAX} options")
        self._handle(request)
        return size

    def _receive_flags(self, data: memoryview) -> int:
        decoded = decode_client_flags(data)
        if decoded is None:
            return 0
        client, size = decoded
        if client.flags & ~_HANDSHAKE_FLAGS or not client.flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError(f"client flags {client.flags:#x} are not those of fixed newstyle")
        self._zeroes = not client.flags & HandshakeFlag.NO_ZEROES
        self.state = State.TLS_FIRST if self._starttls is StartTls.REQUIRED else State.PLAIN
        return size

    def secured(self, *, admitted: bool) -> None:
        """The TLS handshake is complete. admitted: whether the client's certificate may open these exports."""
        assert self.state is State.STARTING_TLS
        self._is_secured = True
        self.was_refused = False
        self._contexts_of, self._contexts, self._status = None, (), ()
        self.state = State.PLAIN if admitted else State.FORBIDDEN

    def _handle(self, request: OptionRequest) -> None:
        handler = _OPTIONS[self.state].get(request.code)
        if handler is None:
            self.was_refused |= self.state is State.TLS_FIRST
            self._reply(request, *_OTHERWISE.get(self.state, _UNKNOWN))
            return
        try:
            handler(self, request)
        except BadOption as error:
            self._reply(request, OptionReplyKind.ERR_INVALID, f"the option {error}".encode())

    def _reply(self, request: OptionRequest, kind: OptionReplyKind, payload: bytes = b"") -> None:
        self._output += OptionReply(request.code, kind, payload).encode()

    def _abort(self, request: OptionRequest) -> None:
        self._reply(request, OptionReplyKind.ACK)
        self.state = State.ENDED

    def _start_tls(self, request: OptionRequest) -> None:
        _expect_no_payload(request)
        if self._is_secured:
            raise BadOption("makes no sense within TLS")
        if self._starttls is StartTls.UNAVAILABLE:
            self._reply(request, *_UNKNOWN)
            return
        self._reply(request, OptionReplyKind.ACK)
        self.state = State.STARTING_TLS

    def _export_name_refused(self, request: OptionRequest) -> None:
        # This option has no error reply.
        raise ProtocolError("EXPORT_NAME of a client that may not open anything")

    def _list(self, request: OptionRequest) -> None:
        _expect_no_payload(request)
        for name, export in self._exports.items():
            self._reply(request, OptionReplyKind.SERVER, ServerEntry(name, export.description).encode())
        self._reply(request, OptionReplyKind.ACK)

    def _structured_reply(self, request: OptionRequest) -> None:
        _expect_no_payload(request)
        self.state = State.STRUCTURED
        self._reply(request, OptionReplyKind.ACK)

    def _info(self, request: OptionRequest) -> None:
        self._describe(request, GoRequest.parse(request.payload))

    def _go(self, request: OptionRequest) -> None:
        go = GoRequest.parse(request.payload)
        if self._describe(request, go):
            self._begin(go.name)

    def _describe(self, request: OptionRequest, go: GoRequest) -> bool:
        export = self._exports.get(go.name)
        if export is None:
            self._reply(request, OptionReplyKind.ERR_UNKNOWN, b"there is no such export")
            return False
        infos = [ExportInfo(export.size, self._flags(export)).encode()]
        if Info.NAME in go.infos:
            infos.append(TextInfo(Info.NAME, go.name).encode())
        if Info.DESCRIPTION in go.infos and export.description:
            infos.append(TextInfo(Info.DESCRIPTION, export.description).encode())
        if Info.BLOCK_SIZE in go.infos:
            sizes = BlockSizeInfo(export.minimum_block, export.preferred_block, export.maximum_request)
            infos.append(sizes.encode())
        for info in infos:
            self._reply(request, OptionReplyKind.INFO, info)
        self._reply(request, OptionReplyKind.ACK)
        return True

    def _export_name(self, request: OptionRequest) -> None:
        try:
            name = parse_export_name(request.payload)
        except BadOption as error:
            # This option has no error reply.
            raise ProtocolError(f"an export name that {error}") from error
        export = self._exports.get(name)
        if export is None:
            raise ProtocolError("EXPORT_NAME of an export that does not exist")
        self._output += ExportNameReply(export.size, self._flags(export)).encode(zeroes=self._zeroes)
        self._begin(name)

    def _begin(self, name: str) -> None:
        export = self._exports[name]
        contexts, status = (self._contexts, self._status) if self._contexts_of is export else ((), ())
        self.agreement = Agreement(export, self.state is State.STRUCTURED, contexts, status)
        self.state = State.TRANSMISSION

    def _list_contexts(self, request: OptionRequest) -> None:
        query = MetaContextRequest.parse(request.payload)
        export = self._exports.get(query.name)
        if export is None:
            self._reply(request, OptionReplyKind.ERR_UNKNOWN, b"there is no such export")
            return
        for name in context_names(export):
            if not query.queries or any(matches(name, asked) for asked in query.queries):
                self._reply(request, OptionReplyKind.META_CONTEXT, MetaContext(0, name).encode())
        self._reply(request, OptionReplyKind.ACK)

    def _set_contexts(self, request: OptionRequest) -> None:
        self._contexts_of, self._contexts, self._status = None, (), ()
        query = MetaContextRequest.parse(request.payload)
        export = self._exports.get(query.name)
        if export is None:
            self._reply(request, OptionReplyKind.ERR_UNKNOWN, b"there is no such export")
            return
        chosen: list[MetaContext] = []
        status: list[StatusFunction] = []
        for name in dict.fromkeys(query.queries):
            # What is not offered is left out of the answer: that is how the protocol says no.
            with contextlib.suppress(NotFound):
                status.append(status_function(export, name))
                chosen.append(MetaContext(len(status), name))
                self._reply(request, OptionReplyKind.META_CONTEXT, chosen[-1].encode())
        self._reply(request, OptionReplyKind.ACK)
        self._contexts_of, self._contexts, self._status = export, tuple(chosen), tuple(status)

    def _contexts_too_early(self, request: OptionRequest) -> None:
        raise BadOption("needs structured replies first")

    def _flags(self, export: Export) -> int:
        flags = ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH | ExportFlag.SEND_CACHE
        if export.read_only:
            flags |= ExportFlag.READ_ONLY
        else:
            flags |= ExportFlag.SEND_FUA | ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES
        if export.rotational:
            flags |= ExportFlag.ROTATIONAL
        if export.multi_conn:
            flags |= ExportFlag.CAN_MULTI_CONN
        if self.state is State.STRUCTURED:
            flags |= ExportFlag.SEND_DF
        return flags


_Handler = Callable[[ServerSession, OptionRequest], None]

_Answer = tuple[OptionReplyKind, bytes]
_UNKNOWN: Final[_Answer] = (OptionReplyKind.ERR_UNSUP, b"unknown option")
# What options without an entry are told.
_OTHERWISE: Final[dict[State, _Answer]] = {
    State.TLS_FIRST: (OptionReplyKind.ERR_TLS_REQD, b"this server wants TLS first"),
    State.FORBIDDEN: (OptionReplyKind.ERR_POLICY, b"the role of your certificate may not open these exports"),
}
_ALWAYS: Final[dict[int, _Handler]] = {
    Option.STARTTLS: ServerSession._start_tls,
    Option.EXPORT_NAME: ServerSession._export_name,
    Option.ABORT: ServerSession._abort,
    Option.LIST: ServerSession._list,
    Option.INFO: ServerSession._info,
    Option.GO: ServerSession._go,
    Option.STRUCTURED_REPLY: ServerSession._structured_reply,
}
_OPTIONS: Final[dict[State, dict[int, _Handler]]] = {
    State.TLS_FIRST: {
        Option.STARTTLS: ServerSession._start_tls,
        Option.ABORT: ServerSession._abort,
        Option.EXPORT_NAME: ServerSession._export_name_refused,
    },
    State.FORBIDDEN: {
        Option.ABORT: ServerSession._abort,
        Option.EXPORT_NAME: ServerSession._export_name_refused,
    },
    State.PLAIN: _ALWAYS
    | {
        Option.LIST_META_CONTEXT: ServerSession._contexts_too_early,
        Option.SET_META_CONTEXT: ServerSession._contexts_too_early,
    },
    State.STRUCTURED: _ALWAYS
    | {
        Option.LIST_META_CONTEXT: ServerSession._list_contexts,
        Option.SET_META_CONTEXT: ServerSession._set_contexts,
    },
}


def _expect_no_payload(request: OptionRequest) -> None:
    if request.payload:
        raise BadOption("takes no payload")
