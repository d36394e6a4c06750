"""The primary's configuration."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from stillpoint.config import Address
from stillpoint.errors import InvalidRequest


class Carrier(enum.Enum):
    """What the mirrored writes travel over."""

    TCP = "tcp"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class Listen:
    grpc: Address = Address("127.0.0.1", 7410)
    nbd: Address = Address("127.0.0.1", 10809)


@dataclass(frozen=True, slots=True)
class Standby:
    grpc: Address = Address("127.0.0.1", 7420)
    carrier: Carrier = Carrier.TCP
    peer_timeout_s: float = 5.0  # silence after which the standby counts as gone and writes go on without it


@dataclass(frozen=True, slots=True)
class Limits:
    nbd_connections: int = 64
    request_memory_bytes: int = 48 << 20  # payloads of all NBD connections together
    async_queue_bytes: int = 32 << 20  # per volume: what an asynchronous volume may owe its standby


@dataclass(frozen=True, slots=True)
class PrimaryConfig:
    state_dir: Path
    node: str = "primary"
    listen: Listen = field(default_factory=Listen)
    standby: Standby = field(default_factory=Standby)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.standby.peer_timeout_s <= 0:
            raise InvalidRequest("standby: peer_timeout_s must be above 0")
        if self.limits.request_memory_bytes < 32 << 20:
            raise InvalidRequest("limits: request_memory_bytes must be at least 32MiB, the largest request")
