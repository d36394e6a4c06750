"""The configuration of a failover agent."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from stillpoint.config import Address
from stillpoint.errors import ConfigError

from .lease import LeaseTimes


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """ca: of etcd's certificate. certificate, key: what this agent shows; both or neither."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises ConfigError."""
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("tls: certificate and key go together")
        try:
            context = ssl.create_default_context(cafile=str(self.ca))
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls: cannot use {self.ca} and {self.certificate}: {error}") from None
        return context


@dataclass(frozen=True, slots=True)
class FailoverConfig:
    """node: as the other nodes call it. socket: where the data node connects; its folder admits nobody else.
    cluster: names the keys at etcd, so that several clusters may share it."""

    node: str
    socket: Path
    etcd: tuple[Address, ...]
    cluster: str = "default"
    times: LeaseTimes = field(default_factory=LeaseTimes)
    tls: EtcdTls | None = None

    def __post_init__(self) -> None:
        if not self.etcd:
            raise ConfigError("etcd: name at least one endpoint")

    @property
    def prefix(self) -> str:
        return f"/stillpoint/{self.cluster}"
