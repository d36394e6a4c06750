"""A real etcd of one member, on free loopback ports, with its data in a folder of the test."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from stillpoint.config import Address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EtcdServer:
    """Started on construction; `kill` and `start` end and begin it on the same data and ports."""

    def __init__(self, folder: Path, *, tls: tuple[Path, Path, Path] | None = None) -> None:
        """tls: certificate, key, and the authority whose clients it admits."""
        self._folder = folder
        self._tls = tls
        self.address = Address("127.0.0.1", _free_port())
        self._peer_port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        clients, peers = f"http://{self.address}", f"http://127.0.0.1:{self._peer_port}"
        secured: list[str] = []
        if self._tls is not None:
            clients = f"https://{self.address}"
            certificate, key, authority = map(str, self._tls)
            secured = ["--cert-file", certificate, "--key-file", key, "--trusted-ca-file", authority]
            secured.append("--client-cert-auth")
        self._process = subprocess.Popen(
            [
                "etcd", "--name", "one", "--data-dir", str(self._folder), "--log-level", "error",
                "--listen-client-urls", clients, "--advertise-client-urls", clients,
                "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
                "--initial-cluster", f"one={peers}", *secured,
            ]
        )  # fmt: skip
        give_up = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.address.port), 1):
                return
            assert self._process.poll() is None and time.monotonic() < give_up, "etcd did not start"
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def running_etcd(folder: Path, *, tls: tuple[Path, Path, Path] | None = None) -> Iterator[EtcdServer]:
    server = EtcdServer(folder, tls=tls)
    try:
        yield server
    finally:
        server.kill()
