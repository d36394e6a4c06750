"""Serve one file or block device over NBD: `python -m stillpoint.nbd --file PATH`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvloop

from ..config import NbdTls, TlsConfig
from ..devices import BlockDevice, open_device
from ..errors import StillpointError
from ..security.authorization import Exports
from ..tls import Credentials
from .access import Access
from .export import DeviceExport
from .listen import activated_sockets, listen_tcp, listen_unix, uri
from .server import NbdServer

_THREADS = 4


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        device = open_device([Path(path) for path in options.file], read_only=options.read_only)
    except StillpointError as error:
        return _fail(error)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(device, options))
    except StillpointError as error:
        return _fail(error)
    finally:
        device.close()
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stillpoint.nbd",
        description="Serve a file or block device over NBD. Started by socket activation, it serves the sockets it is"
        " given; otherwise it listens where told, and prints the URI when clients may connect.",
    )
    parser.add_argument(
        "--file", required=True, action="append", metavar="PATH", help="what to serve; several are served as one disk"
    )
    parser.add_argument("--export", default="", metavar="NAME", help="name of the export (default: the empty name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--port", type=int, default=0, help="TCP port (default: a free one)")
    parser.add_argument("--unix", type=Path, metavar="PATH", help="listen on a Unix socket instead")
    parser.add_argument(
        "--tls", type=Path, metavar="FOLDER", help="certificates; clients must use TLS then, with a role for volumes"
    )
    parser.add_argument("--read-only", action="store_true", help="answer writes with a permission error")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port}: is not a port")
    return options


async def _serve(device: BlockDevice, options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    activated = activated_sockets()
    listeners = activated or [listen_unix(options.unix) if options.unix else listen_tcp(options.host, options.port)]
    address = uri(listeners[0], options.export)
    tls = TlsConfig(options.tls, NbdTls.REQUIRE) if options.tls else None
    access = Access.to(Exports.VOLUMES, Credentials(options.tls) if options.tls else None, tls)
    if access is not None:
        address = address.replace("nbd", "nbds", 1)
    # Not a `with`: leaving one would wait for a thread that a dying disk may never let go.
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="nbd")
    export = DeviceExport(options.export, device, executor, description=device.description)
    server = NbdServer({options.export: export}, executor, access=access)
    server.listen(listeners)
    if not activated:  # whoever handed us the sockets knows where they are, and owns standard output
        print(address, flush=True)
    await stopped.wait()
    if not await server.stop():
        print("python -m stillpoint.nbd: the device still works on requests; giving up on it", file=sys.stderr)
        os._exit(1)
    if options.unix:
        options.unix.unlink(missing_ok=True)
    if not device.read_only:
        await loop.run_in_executor(executor, device.flush)
    executor.shutdown()


def _fail(error: StillpointError) -> int:
    print(f"python -m stillpoint.nbd: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
