"""The cluster file: where the three nodes are reached from where standbyctl runs.

primary: { grpc: "127.0.0.1:7410", nbd: "127.0.0.1:10809" }
standby: { grpc: "127.0.0.1:7420", export_grpc: "127.0.0.1:7422", nbd: "127.0.0.1:10810",
           volume_nbd: "127.0.0.1:10809" }
backup:  { grpc: "127.0.0.1:7430", nbd: "127.0.0.1:10811" }
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..config import Address, load_config
from ..errors import ConfigError

CLUSTER_VARIABLE = "STILLPOINT_CLUSTER"
DEFAULT_FILE = Path("cluster.yaml")


@dataclass(frozen=True, slots=True)
class PrimaryAddresses:
    grpc: Address
    nbd: Address


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
    return load_config(find_cluster_file(named), Cluster)
