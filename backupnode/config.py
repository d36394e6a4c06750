"""The backup node's configuration. It has no address of the primary: a backup never touches it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stillpoint.config import Address
from stillpoint.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ListenConfig:
    grpc: Address = Address("127.0.0.1", 7430)
    nbd: Address = Address("127.0.0.1", 10811)


@dataclass(frozen=True, slots=True)
class StandbyConfig:
    grpc: Address = Address("127.0.0.1", 7420)
    export_grpc: Address = Address("127.0.0.1", 7422)


@dataclass(frozen=True, slots=True)
class BackupNodeConfig:
    """compression_level: of zstd; 1 is the fastest that gains much."""

    state_dir: Path
    node: str = "backup"
    repository: Path | None = None
    listen: ListenConfig = field(default_factory=ListenConfig)
    standby: StandbyConfig = field(default_factory=StandbyConfig)
    compression_level: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.compression_level <= 19:
            raise ConfigError(f"compression_level is {self.compression_level}; it must lie between 1 and 19")

    @property
    def repository_path(self) -> Path:
        return self.repository if self.repository is not None else self.state_dir / "repository"
