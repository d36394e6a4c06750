"""The container image under test, and three nodes of it on real container networks.

The networks are those of deploy/compose/compose.yaml, and the nodes run with its configuration files.
"""

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

# The reaper is an image of its own that would have to be pulled; what is started here is removed here.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")

from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

from stillpoint.security.roles import Role
from tests.support.pki import TestPki

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FOLDER = ROOT / "deploy/compose"
CONFIG_FOLDER = COMPOSE_FOLDER / "config"

_BUILD_TIMEOUT_S = 600

# Ports inside the containers, by node and by the cluster file's key.
PORTS = {
    "primary": {"grpc": 7410, "nbd": 10809, "export_grpc": 7422, "snapshot_nbd": 10810},
    "standby": {"grpc": 7420, "export_grpc": 7422, "nbd": 10810, "volume_nbd": 10809},
    "backup": {"grpc": 7430, "nbd": 10811},
}
ROLES = {"primary": Role.DATA, "standby": Role.DATA, "backup": Role.BACKUP}
# What each node is called by the others, and by the host through its published ports.
HOSTS = {
    "primary": ("primary", "primary-datalink", "localhost", "127.0.0.1"),
    "standby": ("standby", "standby-datalink", "localhost", "127.0.0.1"),
    "backup": ("backup", "localhost", "127.0.0.1"),
}
CERTIFICATES = "/etc/stillpoint/certificates/tls"
MODULES = {"primary": "primary", "standby": "standby", "backup": "backupnode"}
# The networks each node is on, and its further names there.
NETWORKS: dict[str, dict[str, list[str]]] = {
    "primary": {"front": [], "datalink": ["primary-datalink"]},
    "standby": {"front": [], "datalink": ["standby-datalink"], "backup": []},
    "backup": {"backup": []},
}


@contextlib.contextmanager
def built_image() -> Iterator[str]:
    """The image of this checkout under a name of its own, removed afterwards; its layers stay for the next build."""
    base = _run([str(ROOT / "deploy/ci/base-image.sh")]).strip()
    image = f"stillpoint-test:{uuid.uuid4().hex[:12]}"
    _run([str(COMPOSE_FOLDER / "build-image.sh")], IMAGE=image, BASE_IMAGE=base, PYTHON=sys.executable)
    # The name the next build finds the unchanged layers by.
    _run(["docker", "tag", image, "stillpoint-test:latest"])
    try:
        yield image
    finally:
        _run(["docker", "image", "rm", image])


@dataclass(frozen=True)
class ContainerCluster:
    nodes: dict[str, DockerContainer]
    pki: TestPki
    networks: dict[str, Network]

    def cluster_file(self) -> str:
        """What standbyctl on the host needs, as YAML."""
        lines = []
        for node, ports in PORTS.items():
            entries = (f'{key}: "127.0.0.1:{self.published_port(node, port)}"' for key, port in ports.items())
            lines.append(f"{node}: {{ {', '.join(entries)} }}\n")
        lines.append(f"tls: {{ directory: {self.pki.issue(Role.ADMIN)}, nbd: require }}\n")
        return "".join(lines)

    def published_port(self, node: str, port: int) -> int:
        return self.nodes[node].get_exposed_port(port)

    def cut(self, node: str, network: str) -> None:
        """Pull the node's plug of that network."""
        _run(["docker", "network", "disconnect", self.networks[network].name, self.nodes[node].get_container_id()])

    def heal(self, node: str, network: str) -> None:
        """Put it back."""
        names = [option for name in (node, *NETWORKS[node][network]) for option in ("--alias", name)]
        identity = self.nodes[node].get_container_id()
        _run(["docker", "network", "connect", *names, self.networks[network].name, identity])

    def kill(self, node: str) -> None:
        """As a machine that loses its power; what is on its disk stays."""
        _run(["docker", "kill", self.nodes[node].get_container_id()])

    def start(self, node: str) -> None:
        """The same machine again. Its published ports may be others."""
        _run(["docker", "start", self.nodes[node].get_container_id()])

    def addresses(self, node: str) -> list[str]:
        """The node's IP address on each of its networks."""
        container = self.nodes[node].get_wrapped_container()
        container.reload()
        return [network["IPAddress"] for network in container.attrs["NetworkSettings"]["Networks"].values()]

    @contextlib.contextmanager
    def logs_on_failure(self) -> Iterator[None]:
        """Print what the nodes logged when the body fails: a failed test shows what was printed."""
        try:
            yield
        except BaseException:
            for node, container in self.nodes.items():
                output, errors = container.get_logs()
                print(f"--- {node}\n{(output + errors).decode(errors='replace')}")
            raise


@contextlib.contextmanager
def container_cluster(image: str, folder: Path) -> Iterator[ContainerCluster]:
    """`folder` for the certificates of its nodes and of its users."""
    pki = TestPki(folder)
    with contextlib.ExitStack() as stack:
        networks = {
            name: stack.enter_context(Network(docker_network_kw={"internal": name == "datalink"}))
            for name in ("front", "datalink", "backup")
        }
        nodes = {node: stack.enter_context(_container(node, image, networks, pki)) for node in PORTS}
        yield ContainerCluster(nodes, pki, networks)


@contextlib.contextmanager
def _container(node: str, image: str, networks: dict[str, Network], pki: TestPki) -> Iterator[DockerContainer]:
    first, *others = NETWORKS[node]
    certificates = pki.issue(ROLES[node], node, hosts=HOSTS[node])
    (certificates / "key.pem").chmod(0o644)  # the node's user inside is another one than ours
    container = (
        DockerContainer(image, read_only=True, cap_drop=["ALL"], security_opt=["no-new-privileges:true"])
        .with_command(["python", "-m", MODULES[node], "--config", f"/etc/stillpoint/{node}.yaml"])
        .with_volume_mapping(CONFIG_FOLDER / f"{node}.yaml", f"/etc/stillpoint/{node}.yaml")
        .with_volume_mapping(certificates, CERTIFICATES)
        .with_tmpfs_mount("/tmp")
        .with_network(networks[first])
        .with_network_aliases(node, *NETWORKS[node][first])
    )
    for port in PORTS[node].values():
        # Any free port of the loopback alone; testcontainers itself knows no way to say so.
        cast("dict[str, Any]", container.ports)[str(port)] = ("127.0.0.1",)
    with container:
        for network in others:
            networks[network].connect(container.get_container_id(), [node, *NETWORKS[node][network]])
        yield container


def compose_command() -> list[str] | None:
    """How compose is called here: the plugin, the program of its own, or None."""
    for command in (["docker", "compose"], ["docker-compose"]):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([*command, "version"], capture_output=True, check=True)
            return command
    return None


def _run(command: list[str], **environment: str) -> str:
    run = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=_BUILD_TIMEOUT_S,
        check=False,
    )
    assert run.returncode == 0, f"{command[0]} failed:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    return run.stdout
