"""The standby's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stillpoint.config import Address, TlsConfig
from stillpoint.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Listen:
    grpc: Address = Address("127.0.0.1", 7420)
    data_link: Address = Address("127.0.0.1", 7421)
    export_grpc: Address = Address("127.0.0.1", 7422)
    nbd: Address = Address("127.0.0.1", 10810)  # snapshots
    volume_nbd: Address = Address("127.0.0.1", 10809)  # volumes, once promoted
    metrics: Address = Address("127.0.0.1", 7520)  # Prometheus, http


@dataclass(frozen=True, slots=True)
class Snapshots:
    stage_bytes: int = 16 << 20  # per volume: writes held in memory while their pre-images become durable
    default_store_size: int = 64 << 30  # cap of the store that is made when none is named; it grows as it is used
    expire: bool = False  # a full store or a cap deletes the oldest snapshot that is not protected, not one's validity
    count_max: int = 0  # snapshots of one volume; 0: 4096
    preserved_size_max: int = 0  # bytes that the snapshots of one volume may hold in stores; 0: no cap


@dataclass(frozen=True, slots=True)
class Limits:
    nbd_connections: int = 64


@dataclass(frozen=True, slots=True)
class StandbyConfig:
    state_dir: Path
    node: str = "standby"
    listen: Listen = field(default_factory=Listen)
    snapshots: Snapshots = field(default_factory=Snapshots)
    limits: Limits = field(default_factory=Limits)
    tls: TlsConfig | None = None

    def __post_init__(self) -> None:
        if self.snapshots.stage_bytes < 1 << 20:
            raise InvalidRequest("snapshots: stage_bytes must be at least 1MiB")
