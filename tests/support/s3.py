"""An S3 service in this process (moto's server), and a proxy that cuts requests off in the middle."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import urllib.request
from collections.abc import Iterator

from backupnode.repository import S3Config
from backupnode.repository.object_storage import ObjectStorage

# Of all times of a lease, so that tests need not wait for a minute.
LEASE_PACE = 0.02


@contextlib.contextmanager
def s3_service() -> Iterator[str]:
    """Yields its URL. Buckets are made by `new_bucket`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(url: str, name: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT")) as answer:
        assert answer.status == 200
    return name


def bucket_storage(url: str, bucket: str) -> ObjectStorage:
    return ObjectStorage.connect(f"s3://{bucket}/backups/of us", S3Config(endpoint=url), lease_pace=LEASE_PACE)


class CuttingProxy:
    """Forwards to a service; of the next `cuts` connections only the first bytes get through, then it hangs up.

    after: that many bytes of a request. drop_answer: the request gets through whole, its answer does not.
    """

    def __init__(self, target_url: str) -> None:
        host, _, port = target_url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        self.after = 0
        self.drop_answer = False
        self.cut_count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as service, contextlib.suppress(OSError):
            threading.Thread(target=self._answer, args=(service, client), daemon=True).start()
            passed = 0
            while data := client.recv(65536):
                if self.cuts and not self.drop_answer and passed + len(data) > self.after:
                    service.sendall(data[: max(0, self.after - passed)])
                    self._hang_up(client, service)
                    return
                passed += len(data)
                service.sendall(data)

    def _answer(self, service: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := service.recv(65536):
                if self.cuts and self.drop_answer:
                    self._hang_up(client, service)
                    return
                client.sendall(data)

    def _hang_up(self, *sockets: socket.socket) -> None:
        self.cuts -= 1
        self.cut_count += 1
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
