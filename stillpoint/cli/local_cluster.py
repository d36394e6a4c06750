"""A cluster of three node processes on this machine, for trying things out, for demonstrations and for tests.

    DIR/cluster.yaml  primary.yaml  standby.yaml  backup.yaml     written once, so the ports stay
    DIR/pki/                                                      an authority and everybody's certificates
    DIR/primary/  standby/  backup/                               the nodes' state
    DIR/logs/NODE.log   DIR/run/NODE.pid

Calls between the nodes and the data link are secured as they are between machines. The NBD ports take TLS and plaintext
unless told otherwise: on loopback that is the rule everywhere, and every NBD program can be tried out without more ado.

Nothing here knows the nodes' inside: it writes their configuration, runs them, and asks their health.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from ..config import Address, check_name, format_size
from ..errors import NotFound, Refused, StillpointError
from ..wire.v1 import common_pb2, primary_pb2, standby_pb2
from . import processes
from .cluster import Cluster, read_cluster
from .command import VolumeSpec
from .local_configuration import CARRIERS, Security, configuration, make_certificates, security_of
from .nodes import STATUS_TIMEOUT_S, DataNode, Node, Nodes
from .processes import Process
from .volume import get_volume, wait_in_sync

NODES = ("primary", "standby", "backup")
# Readers go first, and the primary before its standby, so that its last writes still reach it.
_STOP_ORDER = ("backup", "primary", "standby")
_MODULES = {"primary": "primary", "standby": "standby", "backup": "backupnode"}

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
SYNC_TIMEOUT_S = 60.0
# How long the standby's export process may take to notice that its main process is gone.
ORPHAN_TIMEOUT_S = 5.0
_LOG_LINES = 5


class LocalCluster:
    """The cluster in one directory, running or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.cluster_file = self.directory / "cluster.yaml"

    # Configuration

    @property
    def exists(self) -> bool:
        return self.cluster_file.exists()

    def cluster(self) -> Cluster:
        if not self.exists:
            raise NotFound(
                f"there is no local cluster in {self.directory}; make one with `standbyctl local up --dir DIR`"
            )
        return read_cluster(self.cluster_file)

    def nodes(self) -> Nodes:
        return Nodes(self.cluster())

    def log_file(self, node: str) -> Path:
        return self.directory / "logs" / f"{node}.log"

    def process(self, node: str) -> Process | None:
        """The node's main process; None when it does not run."""
        return processes.read_pid_file(self._pid_file(node))

    def _pid_file(self, node: str) -> Path:
        return self.directory / "run" / f"{node}.pid"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One standbyctl at a time starts and stops nodes here; the next one waits."""
        try:
            for folder in ("run", "logs"):
                (self.directory / folder).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.directory / "run" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StillpointError(f"cannot use {self.directory} for a local cluster: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _configure(self, carrier: str | None, security: Security | None) -> bool:
        """Write what is not there yet. True: the cluster is new."""
        if not self.exists:
            security = security or Security.DEFAULT
            if security is not Security.INSECURE:
                make_certificates(self.directory / "pki")
            for name, document in configuration(self.directory, carrier or CARRIERS[0], security).items():
                (self.directory / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
            return True
        if security not in (None, security_of(self.cluster())):
            raise Refused(
                f"the cluster in {self.directory} was made {security_of(self.cluster()).value}; that stays as it is: "
                "make another one in another --dir"
            )
        file = self.directory / "primary.yaml"
        document = yaml.safe_load(file.read_text())
        if carrier is not None and document["standby"]["carrier"] != carrier:
            if self.process("primary") is not None:
                raise Refused(
                    f"the primary runs with the carrier {document['standby']['carrier']}; "
                    f"`standbyctl local down --dir {self.directory}` first"
                )
            document["standby"]["carrier"] = carrier
            file.write_text(yaml.safe_dump(document, sort_keys=False))
        return False

    # Starting

    async def up(
        self,
        volumes: Sequence[VolumeSpec] = (),
        *,
        carrier: str | None = None,
        security: Security | None = None,
    ) -> list[str]:
        """Start the nodes that do not run, make the volumes that are not there, wait until each is in sync.

        The nodes it started; when something fails these are stopped again, and a new cluster is forgotten.
        """
        for volume in volumes:
            check_name(volume.name, "volume")
        with self._locked():
            is_new = self._configure(carrier, security)
            started: list[str] = []
            try:
                for node in NODES:
                    if self.process(node) is None:
                        self._launch(node)
                        started.append(node)
                for node in NODES:
                    await self._wait_serving(node)
                async with self.nodes() as nodes:
                    for volume in volumes:
                        await _ensure_volume(nodes, volume)
            except BaseException:
                self._stop([node for node in _STOP_ORDER if node in started])
                if is_new:
                    self._forget()
                raise
            return started

    async def start(self, node: str) -> bool:
        """Start one node and wait until it serves; False when it runs already."""
        self.cluster()
        with self._locked():
            if self.process(node) is not None:
                return False
            self._launch(node)
            await self._wait_serving(node)
            return True

    def _launch(self, node: str) -> None:
        process = processes.start_module(
            _MODULES[node], "--config", str(self.directory / f"{node}.yaml"), log_file=self.log_file(node)
        )
        processes.write_pid_file(self._pid_file(node), process)

    async def _wait_serving(self, node: str) -> None:
        async with self.nodes() as nodes:
            parts = {"primary": (nodes.primary,), "standby": (nodes.standby, nodes.export), "backup": (nodes.backup,)}
            for part in parts[node]:
                await self._wait_part_serving(node, part)

    async def _wait_part_serving(self, node: str, part: Node) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        # gRPC waits longer and longer between its attempts to connect; a plain connect says at once that it may try.
        while not (_is_listening(part.address) and await part.is_serving()):
            process = processes.read_pid_file(self._pid_file(node))
            if process is None:
                raise StillpointError(f"the {node} stopped while it started: {self._last_words(node)}")
            if time.monotonic() > deadline:
                raise StillpointError(
                    f"the {part.name} does not serve after {START_TIMEOUT_S:.0f} s: {self._last_words(node)}"
                )
            processes.reap([process])
            await asyncio.sleep(0.05)

    def _last_words(self, node: str) -> str:
        lines = processes.last_lines(self.log_file(node), _LOG_LINES)
        return f"{' | '.join(lines) or 'it said nothing'} (log: {self.log_file(node)})"

    # Stopping

    def down(self) -> list[str]:
        """Stop the nodes in order; those that ran. Raises StillpointError when one had to be killed."""
        self.cluster()
        with self._locked():
            running = [node for node in _STOP_ORDER if self.process(node) is not None]
            killed = self._stop(running)
        if killed:
            raise StillpointError(
                f"the {' and the '.join(killed)} did not stop within {STOP_TIMEOUT_S:.0f} s and was killed; "
                f"the log in {self.directory / 'logs'} may say why"
            )
        return running

    def _stop(self, nodes: Sequence[str]) -> list[str]:
        """Those that did not obey and were killed."""
        killed = []
        for node in nodes:
            process = self.process(node)
            if process is None:
                continue
            family = [process, *process.children()]
            process.send(signal.SIGTERM)
            # A stopped process gets no SIGTERM until it goes on.
            process.send(signal.SIGCONT)
            left = processes.wait_gone(family, timeout_s=STOP_TIMEOUT_S)
            for each in left:
                each.send(signal.SIGKILL)
            if left:
                processes.wait_gone(left, timeout_s=STOP_TIMEOUT_S)
                killed.append(node)
            self._pid_file(node).unlink(missing_ok=True)
        return killed

    def kill(self, node: str) -> Process:
        """SIGKILL to the node's main process, as a power failure would; returns when all of the node is gone."""
        self.cluster()
        with self._locked():
            process = self.process(node)
            if process is None:
                raise Refused(f"the {node} does not run")
            family = [process, *process.children()]
            process.send(signal.SIGKILL)
            left = processes.wait_gone(family, timeout_s=ORPHAN_TIMEOUT_S)
            for each in left:
                each.send(signal.SIGKILL)
            self._pid_file(node).unlink(missing_ok=True)
            if left:
                processes.wait_gone(left, timeout_s=ORPHAN_TIMEOUT_S)
                raise StillpointError(
                    f"{len(left)} processes of the {node} lived on {ORPHAN_TIMEOUT_S:.0f} s after its main process "
                    f"was killed, and were killed too"
                )
            return process

    def _forget(self) -> None:
        for name in ("cluster", *NODES):
            (self.directory / f"{name}.yaml").unlink(missing_ok=True)
        shutil.rmtree(self.directory / "pki", ignore_errors=True)

    # What clients need

    async def environment(self) -> dict[str, Any]:
        """Addresses, pids and paths, for scripts. A pid is null when the process does not run."""
        cluster = self.cluster()
        tls = cluster.tls
        scheme = "nbds" if security_of(cluster) is Security.NBD_TLS else "nbd"
        pids = {node: process.pid if (process := self.process(node)) else None for node in NODES}
        async with self.nodes() as nodes:
            export_pid = await _export_pid(nodes) if pids["standby"] else None
            volumes = await self._volume_paths(nodes)
        return {
            "cluster": str(self.cluster_file),
            "primary": {
                "pid": pids["primary"],
                "grpc": str(cluster.primary.grpc),
                "nbd": f"{scheme}://{cluster.primary.nbd}",
            },
            "standby": {
                "pid": pids["standby"],
                "export_pid": export_pid,
                "grpc": str(cluster.standby.grpc),
                "nbd": f"{scheme}://{cluster.standby.nbd}",
                "volume_nbd": f"{scheme}://{cluster.standby.volume_nbd}",
            },
            "backup": {
                "pid": pids["backup"],
                "grpc": str(cluster.backup.grpc),
                "nbd": f"{scheme}://{cluster.backup.nbd}",
            },
            "tls": {"admin": str(tls.directory), "client": str(tls.directory.with_name("client"))} if tls else None,
            "volumes": volumes,
        }

    async def _volume_paths(self, nodes: Nodes) -> dict[str, dict[str, Any]]:
        """Where the volumes' bytes are. A node that is down keeps its files, so what it last said still counts."""
        file = self.directory / "run" / "volumes.json"
        known: dict[str, dict[str, Any]] = {}
        with suppress(FileNotFoundError, ValueError):
            known = json.loads(file.read_text())
        primary = {name: paths["primary_path"] for name, paths in known.items()}
        mirrors = {name: paths["mirror_path"] for name, paths in known.items()}
        for node, found in zip(nodes.data_nodes, (primary, mirrors), strict=True):
            with suppress(StillpointError):
                found |= await _copies(node)
        paths = {
            name: {"primary_path": primary.get(name), "mirror_path": mirrors.get(name)}
            for name in sorted(primary.keys() | mirrors.keys())
        }
        replacement = file.with_suffix(".new")
        replacement.write_text(json.dumps(paths))
        replacement.rename(file)
        return paths


async def _copies(node: DataNode) -> dict[str, Any]:
    """Where a host's copies are, those that it serves and those that it mirrors."""
    served = await node.serving.call(
        "ListVolumes", common_pb2.Empty(), primary_pb2.VolumeList, timeout_s=STATUS_TIMEOUT_S
    )
    mirrored = await node.mirroring.call(
        "GetStatus", common_pb2.Empty(), standby_pb2.StandbyStatus, timeout_s=STATUS_TIMEOUT_S
    )
    return {volume.name: _path(volume.device_paths) for volume in served.volumes} | {
        mirror.volume: _path(mirror.device_paths) for mirror in mirrored.mirrors
    }


def _path(device_paths: Sequence[str]) -> str | list[str] | None:
    """The path; a list of them for a volume of several devices."""
    if not device_paths:
        return None
    return device_paths[0] if len(device_paths) == 1 else list(device_paths)


async def _export_pid(nodes: Nodes) -> int | None:
    try:
        answer = await nodes.standby.call(
            "GetStatus", common_pb2.Empty(), standby_pb2.StandbyStatus, timeout_s=STATUS_TIMEOUT_S
        )
    except StillpointError:
        return None
    return answer.export_pid or None


async def _ensure_volume(nodes: Nodes, spec: VolumeSpec) -> None:
    try:
        volume = await get_volume(nodes, spec.name)
    except NotFound:
        request = primary_pb2.CreateVolumeRequest(name=spec.name, size=spec.size, mode=primary_pb2.ACK_MODE_SYNC)
        volume = await nodes.primary.call("CreateVolume", request, primary_pb2.Volume)
    if volume.size != spec.size:
        raise Refused(
            f"the volume {spec.name} is there already with {format_size(volume.size)}, not {format_size(spec.size)}"
        )
    volume = await wait_in_sync(nodes, spec.name, timeout_s=SYNC_TIMEOUT_S)
    if volume.pair.state != primary_pb2.PAIR_STATE_IN_SYNC:
        why = volume.pair.detail or "the primary gives no reason"
        raise StillpointError(f"the volume {spec.name} is not in sync after {SYNC_TIMEOUT_S:.0f} s: {why}")


def _is_listening(address: Address) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address.host, address.port)) == 0
