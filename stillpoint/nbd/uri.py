"""NBD URIs: `nbd://host:port/name` and `nbd+unix:///name?socket=PATH`; with `nbds` for `nbd` where TLS is a must.

`tls-certificates=FOLDER` names our certificate, `tls-hostname=NAME` what the server's must say if it is not the host.
Both mean what they mean to libnbd.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from ..errors import InvalidRequest
from .constants import DEFAULT_PORT


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is. Either `host` and `port`, or `socket_path`."""

    name: str
    host: str = ""
    port: int = DEFAULT_PORT
    socket_path: str = ""
    tls: bool = False
    certificates: str = ""
    tls_hostname: str = ""

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Raises InvalidRequest."""
        try:
            parts = urlsplit(text)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise InvalidRequest(f"{text}: is not an NBD URI: {error}") from error
        name = unquote(parts.path.removeprefix("/"))
        query = parse_qs(parts.query)
        secured = parts.scheme in ("nbds", "nbds+unix")
        certificates = query.get("tls-certificates", [""])[-1]
        hostname = query.get("tls-hostname", [""])[-1]
        if not secured and (certificates or hostname):
            raise InvalidRequest(f"{text}: asks for TLS parameters, but nbds:// is what asks for TLS")
        if parts.scheme in ("nbd", "nbds"):
            if not host:
                raise InvalidRequest(f"{text}: names no host")
            port = DEFAULT_PORT if port is None else port
            return cls(name, host, port, tls=secured, certificates=certificates, tls_hostname=hostname)
        if parts.scheme in ("nbd+unix", "nbds+unix"):
            sockets = query.get("socket", [])
            if len(sockets) != 1 or host:
                raise InvalidRequest(f"{text}: should be {parts.scheme}:///NAME?socket=PATH")
            path = sockets[0]
            return cls(name, socket_path=path, tls=secured, certificates=certificates, tls_hostname=hostname)
        raise InvalidRequest(f"{text}: is not an NBD URI (nbd://, nbds://, nbd+unix:// or nbds+unix://)")

    @property
    def server_name(self) -> str:
        """What the server's certificate must say."""
        return self.tls_hostname or self.host or "localhost"

    def __str__(self) -> str:
        # Without the certificates: this is for messages, and those who read them may be others.
        scheme = "nbds" if self.tls else "nbd"
        if self.socket_path:
            return f"{scheme}+unix:///{quote(self.name)}?socket={quote(self.socket_path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{quote(self.name)}"
