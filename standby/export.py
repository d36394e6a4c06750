"""The export process: serves snapshots over NBD and gRPC, and never touches a mirrored write.

It opens mirrors, stores and maps read-only. It ends when the main process does. `export_supervisor` starts it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import socket
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from stillpoint import log
from stillpoint.config import Address, NbdTls, TlsConfig
from stillpoint.errors import NotFound, StillpointError
from stillpoint.metrics import nbd_statistics
from stillpoint.nbd.access import Access
from stillpoint.nbd.budget import Budget
from stillpoint.nbd.export import DeviceExport
from stillpoint.nbd.listen import listen_tcp
from stillpoint.nbd.server import NbdServer
from stillpoint.runtime import GrpcServer, resident_bytes, run_until_stopped, serve_grpc
from stillpoint.security.authorization import Exports
from stillpoint.tls import open_credentials
from stillpoint.traffic import Traffic

from .changes import Instant, instants
from .export_control import ControlSocket
from .export_service import SERVICE_NAME, ExportService
from .exported import Exported

logger = logging.getLogger(__name__)

_THREADS = 8
_BUDGET_BYTES = 48 << 20


class ExportNode:
    """Everything runs on the loop, reads that must wait for a disk in threads."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="read")
        self.exported: dict[str, Exported] = {}
        self._instants: dict[str, dict[str, Instant]] = {}  # by volume
        self.read_bytes = 0
        self._past: defaultdict[str, Traffic] = defaultdict(Traffic)  # by volume, of snapshots no longer served
        self._directory: dict[str, DeviceExport] = {}
        self.nbd = NbdServer(self._directory, self.executor, budget=Budget(_BUDGET_BYTES))
        self._grpc: GrpcServer | None = None

    def find(self, volume: str, snapshot: str) -> Exported:
        found = self.exported.get(f"{volume}@{snapshot}")
        if found is None:
            raise NotFound(f"there is no snapshot {volume}@{snapshot}")
        return found

    @property
    def streams(self) -> int:
        return sum(len(exported.streams) for exported in self.exported.values())

    async def listen(self, listen: dict[str, Any]) -> dict[str, Any]:
        grpc_address, nbd_address = Address.parse(listen["grpc"]), Address.parse(listen["nbd"])
        tls = listen["tls"] and TlsConfig(Path(listen["tls"]["directory"]), NbdTls(listen["tls"]["nbd"]))
        credentials = open_credentials(tls)
        self.nbd = NbdServer(
            self._directory,
            self.executor,
            budget=Budget(_BUDGET_BYTES),
            connection_max=listen["nbd_connections"],
            access=Access.to(Exports.SNAPSHOTS, credentials, tls),
        )
        listener = listen_tcp(nbd_address.host, nbd_address.port)
        service = ExportService(self)

        def add(server: grpc.aio.Server) -> None:
            service.add_to(server)

        try:
            self._grpc = await serve_grpc(grpc_address, add, [SERVICE_NAME], credentials)
            self.nbd.listen([listener])
        except StillpointError:
            listener.close()
            raise
        nbd_port = listener.getsockname()[1]
        return {"grpc_port": self._grpc.address.port, "nbd_port": nbd_port}

    async def update(self, volume: str, description: dict[str, Any] | None) -> None:
        """Serve what the description says, and nothing else of that volume.

        A snapshot that is no more is not to be found any more, and whoever has it open gets errors for an answer; with
        a whole volume connections end too. Raises, at the end, what opening one of the snapshots raised.
        """
        self._instants[volume] = instants(description) if description is not None else {}
        wanted = {
            f"{volume}@{snapshot['name']}": snapshot
            for snapshot in (description or {}).get("snapshots", ())
            if snapshot["state"] == "active"
        }
        for name, exported in list(self.exported.items()):
            if exported.description["volume"] == volume and (
                name not in wanted or wanted[name]["uuid"] != exported.uuid
            ):
                if description is None:
                    await self._withdraw(name)
                else:
                    self._take_off(name).close()
        failure: StillpointError | None = None
        for name, snapshot in wanted.items():
            if name not in self.exported:
                assert description is not None
                try:
                    exported = Exported(
                        description, snapshot, self.executor, instants=functools.partial(self._instants_of, volume)
                    )
                except StillpointError as error:
                    failure = error
                    continue
                self.exported[name] = exported
                self._directory[name] = exported.nbd
        if failure is not None:
            raise failure

    def _instants_of(self, volume: str) -> dict[str, Instant]:
        return self._instants.get(volume, {})

    async def _withdraw(self, name: str) -> None:
        exported = self._take_off(name)
        await self.nbd.drop(exported.nbd)
        exported.close()

    def _take_off(self, name: str) -> Exported:
        """Let nobody find it any more."""
        exported = self.exported.pop(name)
        del self._directory[name]
        self._past[exported.description["volume"]].add(exported.nbd.traffic)
        return exported

    def readers(self, name: str) -> list[str]:
        """Who has the snapshot open: one entry for each NBD connection and each gRPC stream."""
        exported = self.exported.get(name)
        if exported is None:
            return []
        return [f"NBD client {peer}" for peer in self.nbd.peers(exported.nbd)] + [
            f"gRPC client {peer}" for peer in exported.streams
        ]

    def statistics(self) -> dict[str, Any]:
        """Since this process started; can be written as JSON. By volume: snapshots come and go."""
        by_volume: defaultdict[str, Traffic] = defaultdict(Traffic)
        for volume, past in self._past.items():
            by_volume[volume].add(past)
        for exported in self.exported.values():
            by_volume[exported.description["volume"]].add(exported.nbd.traffic)
        return {
            **nbd_statistics(self.nbd),
            "streams": self.streams,
            "stream_bytes": self.read_bytes,
            "resident": resident_bytes(),
            "traffic": {volume: traffic.document() for volume, traffic in by_volume.items()},
        }

    async def withdraw(self, name: str) -> list[str]:
        """Serve the snapshot no longer, unless somebody reads it: those, and nothing has changed then."""
        readers = self.readers(name)
        if not readers and name in self.exported:
            await self._withdraw(name)
        return readers

    async def stop(self) -> None:
        await self.nbd.stop()
        if self._grpc is not None:
            await self._grpc.stop()
        self.executor.shutdown(wait=False)


async def serve(control_fd: int, stop: asyncio.Event) -> None:
    """Until the main process closes its end, or SIGTERM."""
    control = await ControlSocket.over(socket.socket(fileno=control_fd))
    node = ExportNode()

    async def obey() -> None:
        async for message in control.messages():
            answer: dict[str, Any] = {"done": message["number"]}
            try:
                if "listen" in message:
                    answer |= await node.listen(message["listen"])
                elif "withdraw" in message:
                    answer["readers"] = await node.withdraw(message["withdraw"])
                elif "statistics" in message:
                    answer["statistics"] = node.statistics()
                elif "readers" in message:
                    answer["readers"] = {name: found for name in message["readers"] if (found := node.readers(name))}
                else:
                    await node.update(message["volume"], message["description"])
            except StillpointError as error:
                answer["error"] = str(error)
            control.send(answer)
        stop.set()

    obeying = asyncio.create_task(obey())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([obeying, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if obeying.done():
        obeying.result()
    obeying.cancel()
    await node.stop()


def main() -> int:
    if not __debug__:
        return 2
    parser = argparse.ArgumentParser(prog="standby.export", description="Started by the standby; not by hand.")
    parser.add_argument("--control", type=int, required=True, metavar="FD")
    arguments = parser.parse_args()
    log.configure("export")
    return run_until_stopped("export", lambda stop: serve(arguments.control, stop))


if __name__ == "__main__":
    sys.exit(main())
