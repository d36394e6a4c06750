"""Who may open what an NBD port serves, and whether in plaintext."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import Enum, auto

from ..config import NbdTls, TlsConfig
from ..security.authorization import EXPORTS, Exports, Roles
from ..tls import Credentials, is_loopback


class StartTls(Enum):
    """What a server says to STARTTLS."""

    UNAVAILABLE = auto()
    OFFERED = auto()
    REQUIRED = auto()


@dataclass(frozen=True, slots=True)
class Access:
    """credentials: ours, for TLS. roles: of the clients that may open the exports; asked of all who come by TLS."""

    credentials: Credentials
    mode: NbdTls
    roles: Roles

    @classmethod
    def to(cls, exports: Exports, credentials: Credentials | None, config: TlsConfig | None) -> Access | None:
        """None: there is no TLS, and who reaches the port may open everything."""
        if credentials is None or config is None:
            return None
        return cls(credentials, config.nbd, EXPORTS[exports])

    def starttls(self, sock: socket.socket) -> StartTls:
        """On connections to this listening socket."""
        may_be_plain = self.mode is NbdTls.ALLOW or (self.mode is NbdTls.AUTO and is_loopback(sock))
        return StartTls.OFFERED if may_be_plain else StartTls.REQUIRED
