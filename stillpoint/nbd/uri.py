"""NBD URIs: `nbd://host:port/name` and `nbd+unix:///name?socket=PATH`."""

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

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Raises InvalidRequest."""
        try:
            parts = urlsplit(text)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise InvalidRequest(f"{text}: is not an NBD URI: {error}") from error
        name = unquote(parts.path.removeprefix("/"))
        if parts.scheme == "nbd":
            if not host:
                raise InvalidRequest(f"{text}: names no host")
            return cls(name, host=host, port=DEFAULT_PORT if port is None else port)
        if parts.scheme == "nbd+unix":
            sockets = parse_qs(parts.query).get("socket", [])
            if len(sockets) != 1 or host:
                raise InvalidRequest(f"{text}: should be nbd+unix:///NAME?socket=PATH")
            return cls(name, socket_path=sockets[0])
        raise InvalidRequest(f"{text}: is not an NBD URI (nbd:// or nbd+unix://)")

    def __str__(self) -> str:
        if self.socket_path:
            return f"nbd+unix:///{quote(self.name)}?socket={quote(self.socket_path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{quote(self.name)}"
