"""What `standbyctl local` writes into a new cluster's directory: free ports, configuration files, certificates."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from ..config import NbdTls
from ..errors import InUse
from ..security.roles import Identity, Role
from .cluster import Cluster

CARRIERS = ("tcp", "grpc")
_ROLES = {
    "primary": Role.DATA,
    "standby": Role.DATA,
    "backup": Role.BACKUP,
    "admin": Role.ADMIN,
    "client": Role.CLIENT,
}


class Security(Enum):
    """How a local cluster was made."""

    DEFAULT = "with TLS between the nodes"
    NBD_TLS = "with TLS between the nodes and for NBD clients"
    INSECURE = "without TLS"


def make_certificates(folder: Path) -> None:
    """An authority, and certificates for the nodes, standbyctl and NBD clients, each in a folder of the holder's name.

    What is there is left alone. They last as long as the authority: nobody outside this machine can use them.
    """
    # Only here: most of what standbyctl does goes without the library, and starts sooner.
    from ..security.pki import CA_KEY, CA_LIFETIME, Authority

    authority = Authority.open(folder) if (folder / CA_KEY).exists() else Authority.create(folder)
    for name, role in _ROLES.items():
        if not (folder / name).exists():
            hosts = ("localhost", "127.0.0.1", "::1") if role.serves else ()
            authority.issue(Identity(role, name), folder / name, hosts=hosts, lifetime=CA_LIFETIME - timedelta(days=1))


def security_of(cluster: Cluster) -> Security:
    if cluster.tls is None:
        return Security.INSECURE
    return Security.NBD_TLS if cluster.tls.nbd is NbdTls.REQUIRE else Security.DEFAULT


def configuration(directory: Path, carrier: str, security: Security) -> dict[str, dict[str, Any]]:
    """The four files, by name; the cluster file last, because it says that the cluster is there."""
    documents = _plain_configuration(directory, carrier)
    if security is not Security.INSECURE:
        nbd = NbdTls.REQUIRE if security is Security.NBD_TLS else NbdTls.AUTO
        for name, document in documents.items():
            holder = "admin" if name == "cluster" else name
            document["tls"] = {"directory": str(directory / "pki" / holder), "nbd": nbd.value}
    return documents


def _plain_configuration(directory: Path, carrier: str) -> dict[str, dict[str, Any]]:
    ports = (f"127.0.0.1:{port}" for port in free_ports(15))
    primary = {name: next(ports) for name in ("grpc", "nbd", "metrics")}
    standby = {name: next(ports) for name in ("grpc", "data_link", "export_grpc", "nbd", "volume_nbd", "metrics")}
    backup = {name: next(ports) for name in ("grpc", "nbd", "metrics")}
    mirroring = {name: next(ports) for name in ("data_link", "export_grpc", "nbd")}
    as_both = {**primary, "export_grpc": mirroring["export_grpc"], "snapshot_nbd": mirroring["nbd"]}
    return {
        "primary": {
            "node": "primary",
            "state_dir": str(directory / "primary"),
            "listen": primary,
            "standby": {"grpc": standby["grpc"], "carrier": carrier},
            "as_standby": {"listen": mirroring},
        },
        "standby": {
            "node": "standby",
            "state_dir": str(directory / "standby"),
            "listen": standby,
            "as_primary": {"standby": {"grpc": primary["grpc"], "carrier": carrier}},
        },
        "backup": {
            "node": "backup",
            "state_dir": str(directory / "backup"),
            "listen": backup,
            "standby": {"grpc": standby["grpc"], "export_grpc": standby["export_grpc"]},
            "standbys": [{"grpc": primary["grpc"], "export_grpc": mirroring["export_grpc"]}],
        },
        "cluster": {
            node: {name: address for name, address in listen.items() if name not in ("data_link", "metrics")}
            for node, listen in (("primary", as_both), ("standby", standby), ("backup", backup))
        },
    }


def free_ports(count: int) -> list[int]:
    """Loopback ports that nothing listens on, below those that the system hands to clients.

    A node keeps its port while it is down; a port from the clients' range could be taken by any connection meanwhile.
    """
    first_client_port = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    highest = first_client_port if first_client_port > 12000 else 65536
    chosen: list[int] = []
    candidates = list(range(max(10820, highest - 20000), highest))
    random.shuffle(candidates)
    for port in candidates:
        if len(chosen) == count:
            break
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            chosen.append(port)
    if len(chosen) < count:
        raise InUse("too few free loopback ports")
    return chosen
