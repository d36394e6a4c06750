"""The client's side of the NBD handshake: bytes in, bytes out. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from ..errors import NotFound, PermissionRefused, ProtocolError
from .codec import (
    BadOption,
    BlockSizeInfo,
    ClientFlags,
    ExportInfo,
    GoRequest,
    MetaContext,
    MetaContextRequest,
    OptionReply,
    OptionRequest,
    decode_greeting,
    decode_option_reply,
    parse_info,
)
from .constants import (
    BASE_ALLOCATION,
    OPTION_ERROR_BIT,
    REQUEST_SIZE_MAX,
    ExportFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReplyKind,
)

_REPLY_COUNT_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class ExportDescription:
    """What the server said about the export."""

    size: int
    flags: int
    minimum_block: int
    request_max: int
    structured: bool
    allocation_id: int | None
    """The number of `base:allocation` in block status replies; None when the server has no such context."""

    def can(self, flag: ExportFlag) -> bool:
        return bool(self.flags & flag)


class State(Enum):
    GREETING = auto()
    STARTTLS = auto()
    SECURING = auto()
    """The server is ready for TLS; `secured` follows."""
    STRUCTURED_REPLY = auto()
    META_CONTEXT = auto()
    GO = auto()
    READY = auto()


class ClientSession:
    """Asks for structured replies, the allocation context and one export, in this order, taking no for an answer.

    tls: first asks for TLS, and there takes no for an end: nothing is ever negotiated in plaintext instead.
    """

    def __init__(self, name: str, *, tls: bool = False) -> None:
        self.state = State.GREETING
        self._tls = tls
        self.description: ExportDescription | None = None
        self._name = name
        self._output = bytearray()
        self._reply_count = 0
        self._structured = False
        self._allocation_id: int | None = None
        self._export: ExportInfo | None = None
        self._block_size = BlockSizeInfo(1, 4096, REQUEST_SIZE_MAX)

    def output(self) -> bytes:
        """The bytes to send now; they are handed out once."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def receive(self, data: memoryview) -> int:
        """Take one message from the start of `data`; returns its size, 0 when it is not complete.

        Raises NotFound, PermissionRefused or ProtocolError when there is no way to go on.
        """
        if self.state in (State.READY, State.SECURING):
            return 0
        if self.state is State.GREETING:
            return self._receive_greeting(data)
        decoded = decode_option_reply(data)
        if decoded is None:
            return 0
        reply, size = decoded
        self._reply_count += 1
        if self._reply_count > _REPLY_COUNT_MAX:
            raise ProtocolError("the server never comes to the point")
        option, handle = self._STEPS[self.state]
        if reply.code != option:
            raise ProtocolError(f"the server answers option {reply.code} instead of {option.name}")
        try:
            handle(self, reply)
        except BadOption as error:
            raise ProtocolError(f"the server's answer to {option.name} {error}") from error
        return size

    def _receive_greeting(self, data: memoryview) -> int:
        decoded = decode_greeting(data)
        if decoded is None:
            return 0
        greeting, size = decoded
        if not greeting.flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError("the server speaks an NBD that is too old")
        flags = HandshakeFlag.FIXED_NEWSTYLE | (greeting.flags & HandshakeFlag.NO_ZEROES)
        self._output += ClientFlags(flags).encode()
        self._ask(State.STARTTLS if self._tls else State.STRUCTURED_REPLY, b"")
        return size

    def secured(self) -> None:
        """The TLS handshake is complete; what there is to say follows in `output`."""
        assert self.state is State.SECURING
        self._ask(State.STRUCTURED_REPLY, b"")

    def _tls_answered(self, reply: OptionReply) -> None:
        if reply.kind != OptionReplyKind.ACK:
            raise PermissionRefused("the server offers no TLS")
        self.state = State.SECURING

    def _ask(self, state: State, payload: bytes) -> None:
        self.state = state
        self._output += OptionRequest(self._STEPS[state][0], payload).encode()

    def _ask_for_export(self) -> None:
        self._ask(State.GO, GoRequest(self._name, (Info.BLOCK_SIZE,)).encode())

    def _structured_answered(self, reply: OptionReply) -> None:
        self._structured = reply.kind == OptionReplyKind.ACK
        if self._structured:
            self._ask(State.META_CONTEXT, MetaContextRequest(self._name, (BASE_ALLOCATION,)).encode())
        else:
            self._raise_if_hopeless(reply)
            self._ask_for_export()

    def _contexts_answered(self, reply: OptionReply) -> None:
        if reply.kind == OptionReplyKind.META_CONTEXT:
            context = MetaContext.parse(reply.payload)
            if context.name == BASE_ALLOCATION:
                self._allocation_id = context.id
            return
        if reply.kind != OptionReplyKind.ACK:
            self._raise_if_hopeless(reply)
            self._allocation_id = None
        self._ask_for_export()

    def _export_answered(self, reply: OptionReply) -> None:
        if reply.kind == OptionReplyKind.INFO:
            info = parse_info(reply.payload)
            if isinstance(info, ExportInfo):
                self._export = info
            elif isinstance(info, BlockSizeInfo):
                self._block_size = info
            return
        if reply.kind != OptionReplyKind.ACK:
            self._raise_if_hopeless(reply)
            raise ProtocolError(f"the server refuses the export with answer {reply.kind:#x}")
        if self._export is None:
            raise ProtocolError("the server did not say how large the export is")
        sizes = self._block_size
        if not 1 <= sizes.minimum <= sizes.maximum:
            raise ProtocolError(f"the server's block sizes make no sense: {sizes.minimum} to {sizes.maximum} bytes")
        self.description = ExportDescription(
            size=self._export.size,
            flags=self._export.flags,
            minimum_block=sizes.minimum,
            request_max=max(min(sizes.maximum, REQUEST_SIZE_MAX), sizes.minimum),
            structured=self._structured,
            allocation_id=self._allocation_id,
        )
        self.state = State.READY

    def _raise_if_hopeless(self, reply: OptionReply) -> None:
        if not reply.kind & OPTION_ERROR_BIT:
            raise ProtocolError(f"the server gives answer {reply.kind:#x} out of place")
        if reply.kind == OptionReplyKind.ERR_UNKNOWN:
            raise NotFound(f"the server has no export named {self._name!r}")
        if reply.kind in (OptionReplyKind.ERR_TLS_REQD, OptionReplyKind.ERR_POLICY):
            raise PermissionRefused("the server wants TLS, or a certificate of another role")

    _STEPS: Final = {
        State.STARTTLS: (Option.STARTTLS, _tls_answered),
        State.STRUCTURED_REPLY: (Option.STRUCTURED_REPLY, _structured_answered),
        State.META_CONTEXT: (Option.SET_META_CONTEXT, _contexts_answered),
        State.GO: (Option.GO, _export_answered),
    }
