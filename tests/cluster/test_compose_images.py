"""Three containers of the real image: the main job over real networks, and the compose file as it is shipped."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stillpoint.cli.health import what_is_wrong
from stillpoint.nbd.client import NbdClient
from stillpoint.security.roles import Role
from tests.support.docker import (
    CERTIFICATES,
    COMPOSE_FOLDER,
    PORTS,
    ContainerCluster,
    built_image,
    compose_command,
    container_cluster,
)
from tests.support.requirements import requires_docker, requires_tools

pytestmark = [requires_docker, requires_tools("nbdcopy"), pytest.mark.slow, pytest.mark.timeout(600)]

VOLUME_SIZE = 24 << 20
READY_TIMEOUT_S = 60
BLOCK_SIZE = 4096
LANES = 8


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    with built_image() as name:
        yield name


@dataclass(frozen=True)
class Operator:
    """Someone at the host: standbyctl with a cluster file, and NBD tools at the published ports."""

    cluster_file: Path
    primary_nbd: str
    standby_nbd: str
    certificates: Path

    def volume(self, name: str) -> str:
        return f"{self.primary_nbd}/{name}?tls-certificates={self.certificates}"

    def snapshot(self, name: str) -> str:
        return f"{self.standby_nbd}/{name}?tls-certificates={self.certificates}"

    def standbyctl(self, *arguments: str) -> Any:
        command = [str(Path(sys.executable).with_name("standbyctl")), "--json", "--cluster", str(self.cluster_file)]
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, f"standbyctl {' '.join(arguments)}: {run.stderr}"
        return json.loads(run.stdout) if run.stdout.strip() else None


@pytest.fixture(scope="module")
def cluster(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerCluster]:
    with container_cluster(image, tmp_path_factory.mktemp("pki")) as nodes:
        addresses = [f"127.0.0.1:{nodes.published_port(node, ports['grpc'])}" for node, ports in PORTS.items()]
        with nodes.logs_on_failure():
            _wait_for(
                "the nodes to serve",
                lambda: not any(what_is_wrong(each, nodes.pki.issue(Role.ADMIN)) for each in addresses),
            )
        yield nodes


def test_three_containers_mirror_snapshot_back_up_and_restore(cluster: ContainerCluster, tmp_path: Path) -> None:
    cluster_file = tmp_path / "cluster.yaml"
    cluster_file.write_text(cluster.cluster_file())
    operator = Operator(
        cluster_file,
        primary_nbd=f"nbds://127.0.0.1:{cluster.published_port('primary', 10809)}",
        standby_nbd=f"nbds://127.0.0.1:{cluster.published_port('standby', 10810)}",
        certificates=cluster.pki.issue(Role.CLIENT),
    )
    with cluster.logs_on_failure():
        _do_the_main_job(operator, tmp_path)


def test_a_cut_data_link_costs_no_acknowledged_write_and_status_tells_the_truth(
    cluster: ContainerCluster, tmp_path: Path
) -> None:
    cluster_file = tmp_path / "cluster.yaml"
    cluster_file.write_text(cluster.cluster_file())
    operator = Operator(
        cluster_file,
        primary_nbd=f"nbds://127.0.0.1:{cluster.published_port('primary', 10809)}",
        standby_nbd=f"nbds://127.0.0.1:{cluster.published_port('standby', 10810)}",
        certificates=cluster.pki.issue(Role.CLIENT),
    )
    operator.standbyctl("volume", "create", "cut", "--size", "16MiB")

    def is_in_sync() -> bool:
        return any(
            volume["name"] == "cut" and volume["pair"]["state"] == "in_sync"
            for volume in operator.standbyctl("volume", "list")
        )

    with cluster.logs_on_failure():
        _wait_for("the volume to be in sync", is_in_sync)
        with _Load(operator.volume("cut")) as load:
            load.wait_for_more()
            cluster.cut("primary", "datalink")
            try:
                _wait_for("the cut to be told", lambda: not is_in_sync())
                load.wait_for_more()  # the clients go on meanwhile
                assert not is_in_sync()
            finally:
                cluster.heal("primary", "datalink")
            _wait_for("the mirror to catch up under load", is_in_sync)
            load.wait_for_more()
        operator.standbyctl("snapshot", "create", "cut", "--name", "after")
        mirrored = tmp_path / "mirrored.raw"
        _nbdcopy(operator.snapshot("cut@after"), mirrored)
    content = mirrored.read_bytes()
    for block, number in load.acknowledged.items():
        stored = int.from_bytes(content[block * BLOCK_SIZE : block * BLOCK_SIZE + 8], "big")
        assert stored == number, f"block {block} holds write {stored}; write {number} was acknowledged"


def test_a_killed_primary_is_replaced_by_its_standby_and_comes_back_as_one(
    cluster: ContainerCluster, tmp_path: Path
) -> None:
    cluster_file = tmp_path / "cluster.yaml"

    def operator() -> Operator:
        """With the ports that the containers have now."""
        cluster_file.write_text(cluster.cluster_file())
        return Operator(
            cluster_file,
            primary_nbd=f"nbds://127.0.0.1:{cluster.published_port('standby', 10809)}",  # once it is promoted
            standby_nbd=f"nbds://127.0.0.1:{cluster.published_port('standby', 10810)}",
            certificates=cluster.pki.issue(Role.CLIENT),
        )

    def is_in_sync() -> bool:
        shown = operator().standbyctl("volume", "show", "fo")
        return bool(shown["pair"]["state"] == "in_sync")

    operator().standbyctl("volume", "create", "fo", "--size", "16MiB")
    before = f"nbds://127.0.0.1:{cluster.published_port('primary', 10809)}/fo"
    with cluster.logs_on_failure():
        _wait_for("the volume to be in sync", is_in_sync)
        load = _Load(f"{before}?tls-certificates={cluster.pki.issue(Role.CLIENT)}")
        with contextlib.suppress(AssertionError), load:  # its connection breaks
            load.wait_for_more()
            standby = operator()  # while the primary's ports can still be asked for
            cluster.kill("primary")
        promoted = standby.standbyctl("promote", "fo")
        assert (promoted["node"], promoted["role"]) == ("standby", "primary")
        served = tmp_path / "served.raw"
        _nbdcopy(standby.volume("fo"), served)
        content = served.read_bytes()
        for block, number in load.acknowledged.items():
            stored = int.from_bytes(content[block * BLOCK_SIZE : block * BLOCK_SIZE + 8], "big")
            assert stored >= number, f"block {block} holds write {stored}; write {number} was acknowledged"
        with _Load(standby.volume("fo")) as more:
            more.wait_for_more()
            cluster.start("primary")
            _wait_for("the old primary to follow", is_in_sync)
        replicas = operator().standbyctl("status", "fo")["replicas"]
        assert {each["node"]: each["role"] for each in replicas} == {"primary": "standby", "standby": "primary"}
        operator().standbyctl("switchover", "fo")
        _wait_for("the roles to be as they were", is_in_sync)


def test_backup_node_reaches_the_standby_and_never_the_primary(cluster: ContainerCluster) -> None:
    probe = ["python", "-m", "stillpoint.cli.health", "--tls", CERTIFICATES]
    assert cluster.nodes["backup"].exec([*probe, "standby:7420"]).exit_code == 0
    addresses = cluster.addresses("primary")
    assert len(addresses) == 2
    for address in addresses:
        assert cluster.nodes["backup"].exec([*probe, f"{address}:7410"]).exit_code == 1


def test_compose_file_brings_up_a_healthy_cluster_that_standbyctl_drives(image: str, tmp_path: Path) -> None:
    compose = compose_command()
    if compose is None:
        pytest.skip("needs docker compose (Debian package docker-compose)")
    ports = {(node, key): _free_port() for node, keys in PORTS.items() for key in keys}
    environment = {f"STILLPOINT_{node}_{key}_PORT".upper(): str(port) for (node, key), port in ports.items()}
    environment["STILLPOINT_IMAGE"] = image
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    environment["STILLPOINT_CERTIFICATES"] = str(certificates)
    command = [*compose, "--file", str(COMPOSE_FOLDER / "compose.yaml")]
    command += ["--project-name", f"stillpoint-test-{os.getpid()}"]

    def run(*arguments: str) -> str:
        answer = subprocess.run(
            [*command, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    cluster_file = tmp_path / "cluster.yaml"
    cluster_file.write_text(
        "".join(
            f"{node}: {{ " + ", ".join(f'{key}: "127.0.0.1:{ports[node, key]}"' for key in keys) + " }\n"
            for node, keys in PORTS.items()
        )
        + "tls: { directory: certificates/admin, nbd: require }\n"
    )
    operator = Operator(
        cluster_file,
        primary_nbd=f"nbds://127.0.0.1:{ports['primary', 'nbd']}",
        standby_nbd=f"nbds://127.0.0.1:{ports['standby', 'nbd']}",
        certificates=certificates / "client",
    )
    try:
        run("up", "--detach")
        containers = run("ps", "--quiet", *PORTS).split()
        assert len(containers) == 3
        _wait_for("three healthy containers", lambda: _health_of(containers) == ["healthy"] * 3)
        _do_the_main_job(operator, tmp_path)
    except BaseException:
        print(run("logs", "--no-color"))
        raise
    finally:
        run("down", "--volumes", "--timeout", "10")


def _do_the_main_job(operator: Operator, folder: Path) -> None:
    image, overwritten = folder / "image.raw", folder / "overwritten.raw"
    image.write_bytes(os.urandom(VOLUME_SIZE))
    overwritten.write_bytes(os.urandom(VOLUME_SIZE))
    from_snapshot, from_backup = folder / "from-snapshot.raw", folder / "from-backup.raw"

    operator.standbyctl("volume", "create", "vol1", "--size", str(VOLUME_SIZE))
    _nbdcopy(image, operator.volume("vol1"))
    snapshot = operator.standbyctl("snapshot", "create", "vol1", "--name", "s1")
    assert snapshot["id"] == "vol1@s1"
    _nbdcopy(overwritten, operator.volume("vol1"))
    _nbdcopy(operator.snapshot("vol1@s1"), from_snapshot)
    assert _same_bytes(from_snapshot, image)

    backup = operator.standbyctl("backup", "run", "vol1")
    _nbdcopy(image, operator.volume("vol1"))
    operator.standbyctl("backup", "restore", backup["id"], str(from_backup))
    assert _same_bytes(from_backup, overwritten)


def _nbdcopy(source: Path | str, target: Path | str) -> None:
    command = ["nbdcopy", "--flush", str(source), str(target)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, f"nbdcopy {source} {target}: {run.stderr}"


def _same_bytes(left: Path, right: Path) -> bool:
    # Not compared with ==, whose explanation by pytest would take minutes over megabytes.
    return subprocess.run(["cmp", "--silent", str(left), str(right)], check=False).returncode == 0


def _health_of(containers: list[str]) -> list[str]:
    command = ["docker", "inspect", "--format", "{{.State.Health.Status}}", *containers]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def _wait_for(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited {READY_TIMEOUT_S} s for {what}"
        time.sleep(0.5)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class _Load:
    """Numbered writes over NBD, several at a time, without a pause. `acknowledged`: the last one of each block."""

    def __init__(self, uri: str) -> None:
        self.acknowledged: dict[int, int] = {}
        self._uri = uri
        self._count = 0
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> _Load:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            assert self._failure is None, self._failure

    def wait_for_more(self) -> None:
        wanted = self._count + 500
        _wait_for("more writes to be answered", lambda: self._count >= wanted or self._failure is not None)
        assert self._failure is None, self._failure

    async def _run(self) -> None:
        try:
            async with await NbdClient.connect(self._uri) as client:
                async with asyncio.TaskGroup() as group:
                    for lane in range(LANES):
                        group.create_task(self._write(client, lane))
        except Exception as error:  # noqa: BLE001 - whatever it was, the test tells
            self._failure = error

    async def _write(self, client: NbdClient, lane: int) -> None:
        """Each lane has blocks of its own, so that its last answered write of a block is the last of all."""
        for number in itertools.count(1):
            if self._stop.is_set():
                return
            block = lane + LANES * (number % 200)
            await client.write(block * BLOCK_SIZE, number.to_bytes(8, "big") + bytes(BLOCK_SIZE - 8))
            self.acknowledged[block] = number
            self._count += 1
