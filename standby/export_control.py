"""What the standby's two processes say to each other: JSON objects, one a line, over a socket pair.

main → export: {"number": n, "volume": name, "description": {...} or null}   the snapshots of one volume, all of them
               {"number": n, "listen": {"grpc": "host:port", "nbd": "host:port", "nbd_connections": 64,
                                         "tls": {"directory": path, "nbd": "auto"} or null}}   first of all
               {"number": n, "withdraw": "VOLUME@NAME"}   serve it no longer, unless somebody reads it
               {"number": n, "readers": ["VOLUME@NAME", …]}   say who reads these
               {"number": n, "statistics": true}   say what was served so far
export → main: {"done": n}, and "error": text when it could not be done; for `listen` also the ports bound;
               for `statistics` "statistics": what `standby/metrics.py` shows;
               for `withdraw` "readers": [text, …], empty when it is withdrawn; for `readers` the same by name

A description is whole, so sending it again is harmless, and an export process that starts anew is told everything.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

# A description lists every snapshot of a volume.
_LINE_LIMIT = 16 << 20


class ControlSocket:
    """One end. Control is rare, so asyncio's streams serve."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> ControlSocket:
        sock.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=_LINE_LIMIT))

    def send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Until the other process is gone."""
        while True:
            try:
                line = await self._reader.readline()
            except (ConnectionError, ValueError):
                return
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)

    def close(self) -> None:
        self._writer.close()
