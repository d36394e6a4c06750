"""The backup node's configuration. It has no address of the primary: a backup never touches it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stillpoint.config import Address, TlsConfig
from stillpoint.errors import ConfigError

from .notify import NotifyConfig
from .opening import secret_in
from .pressure import BEHIND_BYTES
from .repository import S3Config, Secret
from .restore_test import RestoreTestConfig
from .retention import RetentionPolicy
from .schedule import ScheduleConfig


@dataclass(frozen=True, slots=True)
class ListenConfig:
    grpc: Address = Address("127.0.0.1", 7430)
    nbd: Address = Address("127.0.0.1", 10811)
    metrics: Address = Address("127.0.0.1", 7530)  # Prometheus, http


@dataclass(frozen=True, slots=True)
class StandbyConfig:
    grpc: Address = Address("127.0.0.1", 7420)
    export_grpc: Address = Address("127.0.0.1", 7422)


@dataclass(frozen=True, slots=True)
class EncryptionConfig:
    """One of the two makes a new repository encrypted, and opens an encrypted one. A passphrase ends with its line."""

    passphrase_file: Path | None = None
    key_file: Path | None = None

    def secret(self) -> Secret | None:
        """Raises ConfigError for a file that cannot be read."""
        try:
            return secret_in(key_file=self.key_file, passphrase_file=self.passphrase_file)
        except OSError as error:
            raise ConfigError(f"the key of the repository cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class BackupNodeConfig:
    """repository: a folder, or s3://BUCKET/PREFIX; "": a folder in the state directory. s3: of a bucket.

    standbys: other data nodes, one of which may be the standby of a volume at times, as roles change hands.
    compression_level: of zstd; 1 is the fastest that gains much.

    rate_limit: bytes per second that a backup takes from the standby; 0: no limit.
    behind_bytes: of a volume's writes in the standby's memory, from which on backups read slower; 0: never.
    """

    state_dir: Path
    node: str = "backup"
    repository: str = ""
    s3: S3Config = field(default_factory=S3Config)
    listen: ListenConfig = field(default_factory=ListenConfig)
    standby: StandbyConfig = field(default_factory=StandbyConfig)
    standbys: tuple[StandbyConfig, ...] = ()
    compression_level: int = 1
    rate_limit: int = 0
    behind_bytes: int = BEHIND_BYTES
    encryption: EncryptionConfig = field(default_factory=EncryptionConfig)
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    restore_test: RestoreTestConfig = field(default_factory=RestoreTestConfig)
    schedules: tuple[ScheduleConfig, ...] = ()
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    tls: TlsConfig | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.compression_level <= 19:
            raise ConfigError(f"compression_level is {self.compression_level}; it must lie between 1 and 19")

        if self.rate_limit < 0:
            raise ConfigError(f"rate_limit is {self.rate_limit}; it must be a number of bytes per second, or 0")

        labels = [schedule.label for schedule in self.schedules]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"two schedules are named {label}; give one of them another name")

    @property
    def repository_location(self) -> str:
        return self.repository or str(self.state_dir / "repository")
