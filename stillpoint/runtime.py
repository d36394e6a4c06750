"""What it takes to be a node process: the loop, signals, the state directory's lock, a gRPC server with health.

Exit codes: 0 stopped in order, 1 an operating error (one line on stderr), 2 wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeVar

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from . import __version__, log
from .config import Address, load_config
from .errors import ConfigError, InUse, StillpointError
from .nbd.listen import listen_tcp
from .tls import Credentials, check_listener
from .wire.channel import SERVER_OPTIONS, server_credentials
from .wire.guard import Guard
from .wire.v1 import common_pb2

logger = logging.getLogger(__name__)

C = TypeVar("C", bound="NodeConfig")

# Before another gRPC server takes the place of one that ended.
_GRPC_RESTART_S: Final = 0.1


class NodeConfig(Protocol):
    """What the configuration of every node has."""

    @property
    def node(self) -> str: ...


_STARTED_NS = time.time_ns()


def node_info(node: str) -> common_pb2.NodeInfo:
    """This process, for a status answer."""
    return common_pb2.NodeInfo(
        node=node, version=__version__, pid=os.getpid(), started_ns=_STARTED_NS, resident_bytes=resident_bytes()
    )


def resident_bytes() -> int:
    """Memory of this process that is really there, shared pages included."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def lock_state_dir(path: Path) -> int:
    """Create the directory and hold it for this process alone; the descriptor returned keeps the lock.

    Raises InUse when another process holds it: two daemons on one state directory would destroy it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use the state directory {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise InUse(f"the state directory {path} is in use by another process (pid {holder or 'unknown'})") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


class GrpcServer:
    """A gRPC server with the standard health service. Serves from `start` until `stop`.

    grpc's own server ends for good when one call has a path that is not UTF-8, which whoever may connect can send. So
    it is watched, and another one takes its place on the same port.
    """

    def __init__(
        self, address: Address, add: Callable[[grpc.aio.Server], None], credentials: Credentials | None
    ) -> None:
        self.address = address
        self._add = add
        self._credentials = credentials
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises InUse when the port is taken."""
        await self._start()
        self._watching = asyncio.create_task(self._watch(), name="gRPC server")

    async def _start(self) -> None:
        interceptors = [Guard()] if self._credentials is not None else []
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._add(server)
        address = str(self.address)
        try:
            if self._credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, server_credentials(self._credentials))
        except RuntimeError:
            port = 0
        if port == 0:
            raise InUse(f"cannot listen on {address}")
        await server.start()
        self._server, self.address = server, Address(self.address.host, port)

    async def _watch(self) -> None:
        while True:
            assert self._server is not None
            try:
                # Shielded: its cancellation would take grpc's own future along, and `stop` would not get through.
                await asyncio.shield(self._server.wait_for_termination())
                reason = "it ended"
            except Exception as error:  # noqa: BLE001 - whatever it was, the node has to be reached again
                reason = str(error)
            logger.error("the gRPC server ended and is started again: %s", reason, extra={"grpc": self.address})
            while True:
                await asyncio.sleep(_GRPC_RESTART_S)
                try:
                    await self._start()
                    break
                except InUse as error:
                    logger.error("the gRPC server cannot be started again yet: %s", error)

    async def set_serving(self, service: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(service, status)

    async def stop(self, *, grace_s: float = 2.0) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace_s)


async def serve_grpc(
    address: Address,
    add: Callable[[grpc.aio.Server], None],
    service_names: Iterable[str],
    credentials: Credentials | None = None,
) -> GrpcServer:
    """Serve the services that `add` registers, plus health for them and for "" (the whole node).

    credentials: callers must show a certificate of the same authority, whose role decides what they may call. None:
    plaintext, and everybody may call everything; on loopback only.
    Raises InUse when the port is taken, ConfigError for a plaintext port that other machines reach.
    """
    # grpc's own message for a taken port names neither the address nor the reason
    with listen_tcp(address.host, address.port) as probe:
        check_listener(probe, credentials, "gRPC")
    running = GrpcServer(address, add, credentials)
    await running.start()
    for name in ("", *service_names):
        await running.set_serving(name, True)
    return running


def run_node(
    node: str, config_class: type[C], main: Callable[[C, asyncio.Event], Awaitable[None]], *, description: str
) -> int:
    """The whole life of a node process: arguments, configuration, loop, signals. Returns the exit code.

    `main` runs until the event is set (SIGTERM or SIGINT) and then stops in order.
    """
    if not __debug__:
        print(f"stillpoint-{node}: refusing to run under python -O: its assertions guard data", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(prog=f"stillpoint-{node}", description=description)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.yaml", help="the node's configuration")
    parser.add_argument("--log-level", choices=log.LEVELS, default="", help=f"default: ${log.LEVEL_VARIABLE}, or info")
    parser.add_argument(
        "--log-format", choices=log.FORMATS, default="", help=f"default: ${log.FORMAT_VARIABLE}, or human"
    )
    parser.add_argument("--version", action="version", version=f"stillpoint {__version__}")
    arguments = parser.parse_args()
    log.configure(node, level=arguments.log_level, form=arguments.log_format)
    try:
        config = load_config(arguments.config, config_class)
    except ConfigError as error:
        print(f"stillpoint-{node}: {error}", file=sys.stderr)
        return 2
    log.configure(node, node=config.node)
    return run_until_stopped(node, lambda stop: main(config, stop))


def run_until_stopped(node: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main` on uvloop until it returns; SIGTERM and SIGINT set its event. Returns the exit code.

    The process, and what it starts, may from then on open as many files as the system lets it.
    """
    # Each live snapshot holds two descriptors, and 1024, the usual soft limit, is for those who still use select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(body())
    except StillpointError as error:
        return _report(node, [error])
    except BaseExceptionGroup as group:
        operating, others = group.split(StillpointError)
        if others is not None or operating is None:
            raise
        return _report(node, list(_leaves(operating)))
    return 0


def _report(node: str, failures: list[BaseException]) -> int:
    for error in failures:
        print(f"stillpoint-{node}: {error}", file=sys.stderr)
    return 2 if any(isinstance(error, ConfigError) for error in failures) else 1


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
