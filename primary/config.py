"""The primary's configuration."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillpoint.config import Address, TlsConfig
from stillpoint.errors import InvalidRequest

from .hot_extents import CAPACITY_DEFAULT, CAPACITY_MAX, CAPACITY_MIN


class Carrier(enum.Enum):
    """What the mirrored writes travel over."""

    TCP = "tcp"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class Listen:
    grpc: Address = Address("127.0.0.1", 7410)
    nbd: Address = Address("127.0.0.1", 10809)
    metrics: Address = Address("127.0.0.1", 7510)  # Prometheus, http


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
    # Of 4 MiB, per volume: these and an eighth more are dirty after a power loss. 0: everything is.
    hot_extents: int = CAPACITY_DEFAULT
    spin_us: int = 100  # how long to look for a lone write's acknowledgement before sleeping, if that pays; 0: never
    parallel_resyncs: int = 2  # volumes; the others wait for their turn, their mirrors as they were
    resync_rate: int = 0  # bytes a second of all resyncs together, at most; 0: no limit

    def __post_init__(self) -> None:
        if self.hot_extents and not CAPACITY_MIN <= self.hot_extents <= CAPACITY_MAX:
            raise InvalidRequest(f"limits: hot_extents must be 0, or from {CAPACITY_MIN} to {CAPACITY_MAX}")
        if not 0 <= self.spin_us <= 1000:
            raise InvalidRequest("limits: spin_us must be from 0 to 1000")
        if self.parallel_resyncs < 1 or self.resync_rate < 0:
            raise InvalidRequest("limits: parallel_resyncs must be above 0, and resync_rate not below")


@dataclass(frozen=True, slots=True)
class QuiesceHook:
    """How to freeze what uses a volume: a file system by its mountpoint, or a pair of commands."""

    volume: str
    mountpoint: Path | None = None
    freeze: tuple[str, ...] = ()  # the command's words; no shell
    thaw: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        commands = bool(self.freeze), bool(self.thaw)
        if commands != ((False, False) if self.mountpoint is not None else (True, True)):
            raise InvalidRequest(f"volume {self.volume}: give a mountpoint, or both freeze and thaw")

    def document(self) -> dict[str, Any]:
        """For `freezer.py`."""
        freeze, thaw = self.freeze, self.thaw
        if self.mountpoint is not None:
            freeze = ("fsfreeze", "--freeze", str(self.mountpoint))
            thaw = ("fsfreeze", "--unfreeze", str(self.mountpoint))
        return {"name": f"volume {self.volume}", "freeze": list(freeze), "thaw": list(thaw)}


@dataclass(frozen=True, slots=True)
class Quiesce:
    limit_s: float = 10.0  # the longest a volume's users stay frozen, whatever happens
    hooks: tuple[QuiesceHook, ...] = ()

    def __post_init__(self) -> None:
        if self.limit_s <= 0:
            raise InvalidRequest("quiesce: limit_s must be above 0")


@dataclass(frozen=True, slots=True)
class PrimaryConfig:
    state_dir: Path
    node: str = "primary"
    listen: Listen = field(default_factory=Listen)
    standby: Standby = field(default_factory=Standby)
    limits: Limits = field(default_factory=Limits)
    quiesce: Quiesce = field(default_factory=Quiesce)
    tls: TlsConfig | None = None

    def __post_init__(self) -> None:
        if self.standby.peer_timeout_s <= 0:
            raise InvalidRequest("standby: peer_timeout_s must be above 0")
        if self.limits.request_memory_bytes < 32 << 20:
            raise InvalidRequest("limits: request_memory_bytes must be at least 32MiB, the largest request")
