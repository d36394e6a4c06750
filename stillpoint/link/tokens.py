"""One-time tokens: how a fresh data link is tied to the session that was agreed over gRPC.

The token was given out by OpenLink, so whoever shows it is the peer that gRPC knows. It is good for one link and a
short time.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable

from ..channel import Receiver
from ..errors import ProtocolError
from .base import Link
from .frames import HEADER_SIZE, FrameType, read_frames

logger = logging.getLogger(__name__)

TOKEN_SIZE = 32
_TOKEN_LIFETIME_S = 10.0
_HELLO_TIMEOUT_S = 5.0

Adopt = Callable[[Link], Receiver]


class Tokens:
    """The tokens given out and not shown yet, each with who waits behind it."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, tuple[Adopt, asyncio.TimerHandle]] = {}

    def issue(self, adopt: Adopt) -> bytes:
        """A token; `adopt` is called with the link that shows it and returns the link's owner."""
        token = secrets.token_bytes(TOKEN_SIZE)
        timer = asyncio.get_running_loop().call_later(_TOKEN_LIFETIME_S, self.revoke, token)
        self._waiting[token] = (adopt, timer)
        return token

    def revoke(self, token: bytes) -> None:
        entry = self._waiting.pop(token, None)
        if entry is not None:
            entry[1].cancel()

    def redeem(self, shown: bytes) -> Adopt:
        """The `adopt` behind a token, which is spent. Raises ProtocolError for a token that is not known."""
        match = next((token for token in self._waiting if hmac.compare_digest(token, shown)), None)
        if match is None:
            raise ProtocolError("the data link was opened with a token that is unknown, used or too old")
        adopt, timer = self._waiting.pop(match)
        timer.cancel()
        return adopt


class TokenGate:
    """The first owner of a link: waits for HELLO, then hands the link to the session its token names."""

    def __init__(self, tokens: Tokens, peer: str, gone: Callable[[TokenGate], None] = lambda gate: None) -> None:
        """`gone` is called once the link is handed over or has ended."""
        self._tokens = tokens
        self._peer = peer
        self._gone = gone
        self._link: Link | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._token: bytes | None = None

    def guard(self, link: Link) -> None:
        """Start waiting. The link ends if no token comes in time."""
        self._link = link
        late = ProtocolError("no token was shown in time")
        self._timer = asyncio.get_running_loop().call_later(_HELLO_TIMEOUT_S, link.abort, late)

    def abort(self) -> None:
        if self._link is not None:
            self._link.abort()

    def received(self, data: memoryview, /) -> int:
        consumed = read_frames(data, self._hello)
        if self._token is None:
            if len(data) >= HEADER_SIZE + TOKEN_SIZE:
                raise ProtocolError("the first frame on a data link must be HELLO with a token")
            return consumed
        adopt = self._tokens.redeem(self._token)
        self._leave()
        assert self._link is not None
        self._link.receiver = adopt(self._link)
        return consumed

    def _hello(
        self,
        kind: int,
        flags: int,
        epoch: int,
        session: int,
        sequence: int,
        offset: int,
        length: int,
        payload: memoryview,
    ) -> bool:
        if kind != FrameType.HELLO:
            raise ProtocolError("the first frame on a data link must be HELLO with a token")
        self._token = bytes(payload)
        return True

    def drained(self) -> None: ...

    def closed(self, error: Exception | None) -> None:
        self._leave()
        if error is not None:
            logger.warning("data link refused: %s", error, extra={"peer": self._peer})

    def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._gone(self)
