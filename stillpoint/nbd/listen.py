"""Sockets to listen on: TCP, Unix, or handed over by whoever started us (systemd socket activation)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import quote

from ..errors import InUse, InvalidRequest, StillpointError

_BACKLOG: Final = 128
_FIRST_ACTIVATED: Final = 3  # the first descriptor that socket activation hands over


def activated_sockets() -> list[socket.socket]:
    """The listening sockets this process was started with (`LISTEN_FDS`); empty when there are none.

    The variables are removed, so that a child of ours does not think they were meant for it.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = []
    for descriptor in range(_FIRST_ACTIVATED, _FIRST_ACTIVATED + int(count)):
        os.set_inheritable(descriptor, False)
        sockets.append(socket.socket(fileno=descriptor))
    return sockets


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on one address; port 0 picks a free one. Raises InUse, InvalidRequest or StillpointError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InvalidRequest(f"{host}:{port}: is not an address to listen on: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _listen_error(f"{host}:{port}", error) from error
    return listener


def listen_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket; one left over by a process that is gone is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and not _is_served(path):
            path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _listen_error(str(path), error) from error
    return listener


def uri(listener: socket.socket, name: str = "") -> str:
    """What a client on this machine calls the export `name` behind `listener`."""
    if listener.family == socket.AF_UNIX:
        return f"nbd+unix:///{quote(name)}?socket={quote(listener.getsockname())}"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{quote(name)}"


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        with contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            return True
    return False


def _listen_error(address: str, error: OSError) -> StillpointError:
    if error.errno == errno.EADDRINUSE:
        return InUse(f"{address}: another process listens there")
    return StillpointError(f"{address}: cannot listen: {error.strerror}")
