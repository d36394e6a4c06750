"""The backup node's process: builds its parts, runs them until told to stop, ends them in order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final

from stillpoint.attend import attend
from stillpoint.config import Address
from stillpoint.errors import StillpointError
from stillpoint.nbd.access import Access
from stillpoint.nbd.listen import activated_sockets, listen_tcp
from stillpoint.nbd.server import NbdServer
from stillpoint.runtime import lock_state_dir, serve_grpc
from stillpoint.security.authorization import Exports
from stillpoint.tls import Credentials, open_credentials

from .config import BackupNodeConfig
from .export import BackupExports, low_priority_executor
from .metrics import Metrics
from .overlays import Overlays
from .puller import Puller
from .repository import Repository, open_storage, storage_at
from .restore_test import remove_leftovers
from .service import SERVICE_NAME, BackupService
from .standby_client import StandbyClient

logger = logging.getLogger(__name__)

_SWEEP_RETRY_S: Final = 5.0
# A snapshot that a standby could not delete after a backup costs it space.
_SWEEP_PAUSE_S: Final = 600.0


async def run(config: BackupNodeConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set.

    Raises InUse for a state directory or port that is taken, and what opening the repository raises.
    """
    lock = lock_state_dir(config.state_dir)
    try:
        credentials = open_credentials(config.tls)
        async with _repository(config) as repository, _standbys(config, credentials) as standbys:
            await _serve(config, repository, standbys, credentials, stop)
    finally:
        os.close(lock)


async def _serve(
    config: BackupNodeConfig,
    repository: Repository,
    standbys: Sequence[StandbyClient],
    credentials: Credentials | None,
    stop: asyncio.Event,
) -> None:
    await asyncio.to_thread(remove_leftovers, config.state_dir)
    puller = Puller(
        standbys[0],
        repository,
        rate_bytes_s=config.rate_limit,
        behind_bytes=config.behind_bytes,
        others=standbys[1:],
    )
    with low_priority_executor() as low_priority, ThreadPoolExecutor(2, thread_name_prefix="read") as readers:
        exports = await _exports(config, repository, low_priority)
        nbd = NbdServer(exports, low_priority, access=Access.to(Exports.BACKUPS, credentials, config.tls))
        listeners = activated_sockets() or [listen_tcp(config.listen.nbd.host, config.listen.nbd.port)]
        nbd_address = _address(listeners[0])
        service = BackupService(
            repository,
            puller,
            exports,
            nbd,
            readers,
            config,
            nbd_address=nbd_address,
        )
        nbd.listen(listeners)
        try:
            server = await serve_grpc(config.listen.grpc, service.add_to, [SERVICE_NAME], credentials)
            logger.info(
                "backup node serves", extra={"grpc": str(server.address), "nbd": nbd_address, "pid": os.getpid()}
            )
            metrics = Metrics(repository, puller, nbd, service.scheduler)
            try:
                async with (
                    _background(_sweep(puller)),
                    _background(service.maintain()),
                    _background(service.keep_schedules()),
                ):
                    await attend(
                        stop,
                        server,
                        role="backup",
                        node=config.node,
                        metrics=config.listen.metrics,
                        gather=metrics.gather,
                        probes=lambda: {"repository": repository.probe},
                        credentials=credentials,
                    )
                await service.stop()
            finally:
                await server.stop()
        finally:
            await nbd.stop()
            await asyncio.to_thread(exports.close)
    logger.info("backup node stopped")


async def _exports(config: BackupNodeConfig, repository: Repository, executor: Executor) -> BackupExports:
    listing = await repository.list()
    overlays = Overlays(config.state_dir / "overlays")
    overlays.keep_only([*(record.id for record in listing.backups), *listing.damaged])
    exports = BackupExports(repository.open, executor, overlays)
    for record in listing.backups:
        exports.add(record)
    return exports


async def _sweep(puller: Puller) -> None:
    """Delete what a crash left on the standby, as soon as it can be reached, and now and then what it kept later."""
    while True:
        pause_s = _SWEEP_PAUSE_S
        try:
            await puller.sweep()
        except StillpointError as error:
            logger.debug("cannot look for leftover snapshots yet: %s", error)
            pause_s = _SWEEP_RETRY_S
        await asyncio.sleep(pause_s)


@asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` runs beside the body and ends with it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _repository(config: BackupNodeConfig) -> AsyncIterator[Repository]:
    repository = await open_storage(
        storage_at(config.repository_location, config.s3),
        # The state directory is locked, so no other running process has this name.
        owner=f"{socket.gethostname()}:{config.state_dir.resolve()}",
        level=config.compression_level,
        secret=config.encryption.secret(),
    )
    try:
        yield repository
    finally:
        await repository.close()


@asynccontextmanager
async def _standbys(
    config: BackupNodeConfig, credentials: Credentials | None
) -> AsyncIterator[Sequence[StandbyClient]]:
    """The one that is expected to be the standby first."""
    nodes = [
        StandbyClient(standby=each.grpc, export=each.export_grpc, credentials=credentials)
        for each in (config.standby, *config.standbys)
    ]
    try:
        yield nodes
    finally:
        for node in nodes:
            await node.close()


def _address(listener: socket.socket) -> str:
    name = listener.getsockname()
    return name if isinstance(name, str) else str(Address(name[0], name[1]))
