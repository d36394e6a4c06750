"""The process of a data node: its configuration as either daemon reads it, and its life.

`python -m primary` and `python -m standby` run the same node. They differ in what the keys at the top of their
configuration are about, the role that the host has on a good day; the other role's are under `as_standby` and
`as_primary`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc

from standby import config as mirroring
from standby import health as standby_health
from standby import metrics as standby_metrics
from standby.service import SERVICE_NAME as STANDBY_SERVICE
from standby.service import StandbyService
from stillpoint.attend import attend
from stillpoint.canary import Probe
from stillpoint.config import Address
from stillpoint.metrics import Families
from stillpoint.runtime import lock_state_dir, serve_grpc
from stillpoint.tls import open_credentials

from . import config as serving_config
from . import health as primary_health
from . import metrics as primary_metrics
from .data_node import DataNode
from .replica_service import SERVICE_NAME as REPLICA_SERVICE
from .replica_service import ReplicaService
from .service import SERVICE_NAME as PRIMARY_SERVICE
from .service import PrimaryService

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MirrorPorts:
    data_link: Address = Address("127.0.0.1", 7421)
    export_grpc: Address = Address("127.0.0.1", 7422)
    nbd: Address = Address("127.0.0.1", 10810)  # snapshots


@dataclass(frozen=True, slots=True)
class AsStandby:
    """For the volumes that this host mirrors, once another one was promoted."""

    listen: MirrorPorts = field(default_factory=MirrorPorts)
    snapshots: mirroring.Snapshots = field(default_factory=mirroring.Snapshots)
    limits: mirroring.Limits = field(default_factory=mirroring.Limits)


@dataclass(frozen=True, slots=True)
class PrimaryDaemonConfig(serving_config.PrimaryConfig):
    as_standby: AsStandby = field(default_factory=AsStandby)

    @property
    def mirroring(self) -> mirroring.StandbyConfig:
        other = self.as_standby
        return mirroring.StandbyConfig(
            state_dir=self.state_dir,
            node=self.node,
            listen=mirroring.Listen(
                grpc=self.listen.grpc,
                data_link=other.listen.data_link,
                export_grpc=other.listen.export_grpc,
                nbd=other.listen.nbd,
                volume_nbd=self.listen.nbd,
                metrics=self.listen.metrics,
            ),
            snapshots=other.snapshots,
            limits=other.limits,
            tls=self.tls,
        )


@dataclass(frozen=True, slots=True)
class AsPrimary:
    """For the volumes that this host serves, once it was promoted."""

    standby: serving_config.Standby = field(
        default_factory=lambda: serving_config.Standby(grpc=Address("127.0.0.1", 7410))
    )
    limits: serving_config.Limits = field(default_factory=serving_config.Limits)
    quiesce: serving_config.Quiesce = field(default_factory=serving_config.Quiesce)


@dataclass(frozen=True, slots=True)
class StandbyDaemonConfig(mirroring.StandbyConfig):
    as_primary: AsPrimary = field(default_factory=AsPrimary)

    @property
    def serving(self) -> serving_config.PrimaryConfig:
        other = self.as_primary
        return serving_config.PrimaryConfig(
            state_dir=self.state_dir,
            node=self.node,
            listen=serving_config.Listen(
                grpc=self.listen.grpc, nbd=self.listen.volume_nbd, metrics=self.listen.metrics
            ),
            standby=other.standby,
            limits=other.limits,
            quiesce=other.quiesce,
            tls=self.tls,
        )


async def run_primary(config: PrimaryDaemonConfig, stop: asyncio.Event) -> None:
    """Until `stop` is set."""
    await _run(config, config.mirroring, stop, starts_as_primary=True)


async def run_standby(config: StandbyDaemonConfig, stop: asyncio.Event) -> None:
    """Until `stop` is set."""
    await _run(config.serving, config, stop, starts_as_primary=False)


async def _run(
    serving_as: serving_config.PrimaryConfig,
    mirroring_as: mirroring.StandbyConfig,
    stop: asyncio.Event,
    *,
    starts_as_primary: bool,
) -> None:
    lock = lock_state_dir(serving_as.state_dir)
    try:
        credentials = open_credentials(serving_as.tls)
        node = DataNode(serving_as, mirroring_as, credentials, starts_as_primary=starts_as_primary)
        grpc_server = None
        try:
            await node.start()
            grpc_server = await serve_grpc(
                serving_as.listen.grpc,
                functools.partial(_add_services, node),
                [PRIMARY_SERVICE, STANDBY_SERVICE, REPLICA_SERVICE],
                credentials,
            )
            logger.info("serving", extra={"grpc": grpc_server.address, "nbd": node.primary.nbd_address})
            await attend(
                stop,
                grpc_server,
                role="primary" if starts_as_primary else "standby",
                node=serving_as.node,
                metrics=serving_as.listen.metrics,
                gather=functools.partial(_gather, node),
                probes=functools.partial(_probes, node),
                credentials=credentials,
            )
            logger.info("stopping")
        finally:
            if grpc_server is not None:
                await grpc_server.stop()
            await node.stop()
    finally:
        os.close(lock)


def _add_services(node: DataNode, server: grpc.aio.Server) -> None:
    PrimaryService(node.primary).add_to(server)
    StandbyService(node.standby).add_to(server)
    ReplicaService(node).add_to(server)


async def _gather(node: DataNode, families: Families) -> None:
    await primary_metrics.gather(node.primary, families)
    await standby_metrics.gather(node.standby, families)


def _probes(node: DataNode) -> Mapping[str, Probe]:
    """A volume that is served is probed on its clients' way, whether or not it has a mirror's snapshots beneath."""
    return {**standby_health.probes(node.standby), **primary_health.probes(node.primary)}
