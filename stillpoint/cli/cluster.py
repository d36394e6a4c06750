"""The cluster file: where the three nodes are reached from where standbyctl runs.

primary: { grpc: "127.0.0.1:7410", nbd: "127.0.0.1:10809", export_grpc: "127.0.0.1:7412",
           snapshot_nbd: "127.0.0.1:10808" }                   the last two: once it has become a standby
standby: { grpc: "127.0.0.1:7420", export_grpc: "127.0.0.1:7422", nbd: "127.0.0.1:10810",
           volume_nbd: "127.0.0.1:10809" }
backup:  { grpc: "127.0.0.1:7430", nbd: "127.0.0.1:10811" }
tls:     { directory: pki/alice, nbd: auto }    an admin's certificate; relative to this file. Without it: plaintext

tls.nbd says what the nodes' NBD ports want, as it does in their own configuration.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from ..config import Address, NbdTls, TlsConfig, load_config
from ..errors import ConfigError

CLUSTER_VARIABLE = "STILLPOINT_CLUSTER"
DEFAULT_FILE = Path("cluster.yaml")


@dataclass(frozen=True, slots=True)
class PrimaryAddresses:
    grpc: Address
    nbd: Address
    # Of the snapshots that it takes once it has become a standby. None: nobody reads snapshots there by standbyctl.
    export_grpc: Address | None = None
    snapshot_nbd: Address | None = None


@dataclass(frozen=True, slots=True)
class StandbyAddresses:
    grpc: Address
    export_grpc: Address
    nbd: Address  # snapshots
    volume_nbd: Address  # volumes, once promoted


@dataclass(frozen=True, slots=True)
class BackupAddresses:
    grpc: Address
    nbd: Address


@dataclass(frozen=True, slots=True)
class Cluster:
    primary: PrimaryAddresses
    standby: StandbyAddresses
    backup: BackupAddresses
    tls: TlsConfig | None = None

    def nbd_uri(self, address: Address, name: str) -> str:
        """Of an export, for people and their programs: in plaintext where the node takes it."""
        plain = (
            self.tls is None or self.tls.nbd is NbdTls.ALLOW or (self.tls.nbd is NbdTls.AUTO and address.is_loopback)
        )
        return f"nbd://{address}/{name}" if plain else f"nbds://{address}/{name}"

    def own_nbd_uri(self, address: Address, name: str) -> str:
        """Of an export, for our own connection: TLS wherever there are certificates."""
        if self.tls is None:
            return f"nbd://{address}/{name}"
        return f"nbds://{address}/{name}?tls-certificates={quote(str(self.tls.directory))}"


def find_cluster_file(named: Path | None) -> Path:
    """The file named, else $STILLPOINT_CLUSTER, else ./cluster.yaml. Raises ConfigError when it is not there."""
    from_environment = os.environ.get(CLUSTER_VARIABLE)
    path = named or (Path(from_environment) if from_environment else DEFAULT_FILE)
    if path.exists():
        return path
    if named is None and not from_environment:
        raise ConfigError(f"no {DEFAULT_FILE} here; name the cluster with --cluster FILE or ${CLUSTER_VARIABLE}")
    source = "--cluster" if named else f"${CLUSTER_VARIABLE}"
    raise ConfigError(f"the cluster file {path} (from {source}) is not there")


def load_cluster(named: Path | None) -> Cluster:
    return read_cluster(find_cluster_file(named))


def read_cluster(path: Path) -> Cluster:
    """Raises ConfigError."""
    cluster = load_config(path, Cluster)
    if cluster.tls is None:
        return cluster
    return replace(cluster, tls=replace(cluster.tls, directory=path.absolute().parent / cluster.tls.directory))
