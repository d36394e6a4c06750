"""Quiesced snapshots: hooks run around the instant, and nothing stays frozen, whoever dies."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.cli.snapshot_calls import Kind, create_quiesced, create_snapshots
from stillpoint.errors import NotFound, Refused
from stillpoint.wire.v1 import common_pb2, primary_pb2, standby_pb2
from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("qemu-io", "nbdcopy"), pytest.mark.timeout(240)]

MIB = 1 << 20
LIMIT_S = 3.0


class Hooks:
    """Commands that note what they did, and the configuration that names them."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._log = cluster.directory / "hooks.log"

    def configure(self, **scripts: tuple[str, str]) -> None:
        """Restart the primary with hooks: volume=(shell to freeze, shell to thaw), each noted when it begins."""
        path = self._cluster.directory / "primary.yaml"
        document = yaml.safe_load(path.read_text())
        document["quiesce"] = {
            "limit_s": LIMIT_S,
            "hooks": [
                {"volume": volume, "freeze": self._words(volume, "freeze", freeze)}
                | {"thaw": self._words(volume, "thaw", thaw)}
                for volume, (freeze, thaw) in scripts.items()
            ],
        }
        path.write_text(yaml.safe_dump(document))
        self._cluster.kill("primary")
        self._cluster.start("primary")
        for volume in ("a", "b"):
            self._cluster.wait_in_sync(volume)

    def _words(self, volume: str, action: str, script: str) -> list[str]:
        return ["sh", "-c", f"echo {action} {volume} >> {self._log}; {script}"]

    @property
    def done(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def wait_for(self, line: str, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while line not in self.done:
            assert time.monotonic() < deadline, f"no {line!r} in {self.done}"
            time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster.up(tmp_path / "cluster", f"a:{MIB}", f"b:{MIB}") as cluster:
        yield cluster


@pytest.fixture
def hooks(cluster: LocalCluster) -> Hooks:
    return Hooks(cluster)


def primary_call(cluster: LocalCluster, method: str, request: Any, answer: Any) -> Any:
    async def call() -> Any:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            return await nodes.primary.call(method, request, answer)

    return asyncio.run(call())


def freeze(cluster: LocalCluster, *volumes: str) -> Any:
    return primary_call(cluster, "Freeze", primary_pb2.FreezeRequest(volumes=volumes), primary_pb2.FreezeId)


def read(cluster: LocalCluster, snapshot: str) -> bytes:
    uri = f"{cluster.env['standby']['nbd']}/{snapshot}"
    return subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True, timeout=60).stdout


def test_the_snapshot_holds_what_was_written_until_frozen_and_nothing_after(
    cluster: LocalCluster, hooks: Hooks
) -> None:
    uri = f"{cluster.env['primary']['nbd']}/a"
    write = f"qemu-io -f raw -c 'write -P %d 0 4k' {uri} > /dev/null"
    hooks.configure(a=(write % 1, write % 2), b=("true", "true"))
    made = cluster.cli("snapshot", "create", "a", "b", "--name", "quiet", "--quiesce")["snapshots"]
    assert {each["id"] for each in made} == {"a@quiet", "b@quiet"}
    assert hooks.done == ["freeze a", "freeze b", "thaw b", "thaw a"]
    assert read(cluster, "a@quiet")[:4096] == b"\1" * 4096
    assert Path(cluster.env["volumes"]["a"]["primary_path"]).read_bytes()[:4096] == b"\2" * 4096


def test_a_hook_that_fails_leaves_no_snapshot_and_nothing_frozen(cluster: LocalCluster, hooks: Hooks) -> None:
    hooks.configure(a=("true", "true"), b=("exit 3", "true"))
    failed = cluster.run("snapshot", "create", "a", "b", "--quiesce")
    assert (failed.code, failed.error) == (1, "freezing failed: volume b: sh ended with 3")
    assert hooks.done == ["freeze a", "freeze b", "thaw b", "thaw a"]
    assert cluster.cli("snapshot", "list") == []


def test_a_hook_that_hangs_is_killed_at_the_limit_and_all_is_thawed(cluster: LocalCluster, hooks: Hooks) -> None:
    hooks.configure(a=("true", "true"), b=("sleep 600", "true"))
    began = time.monotonic()
    failed = cluster.run("snapshot", "create", "a", "b", "--quiesce")
    assert failed.code == 1
    assert time.monotonic() - began < LIMIT_S + 8
    assert hooks.done == ["freeze a", "freeze b", "thaw b", "thaw a"]
    assert cluster.cli("snapshot", "list") == []


def test_a_caller_that_dies_leaves_the_volume_frozen_for_the_limit_and_no_longer(
    cluster: LocalCluster, hooks: Hooks
) -> None:
    hooks.configure(a=("true", "true"))
    frozen = freeze(cluster, "a")  # and nobody thaws it
    with pytest.raises(Refused, match="is frozen already"):
        freeze(cluster, "a")
    assert hooks.done == ["freeze a"]
    hooks.wait_for("thaw a", timeout_s=LIMIT_S + 3)
    with pytest.raises(Refused, match="the freeze had ended before"):
        primary_call(cluster, "Thaw", frozen, common_pb2.Empty)
    with pytest.raises(NotFound):
        primary_call(cluster, "Thaw", primary_pb2.FreezeId(id="never"), common_pb2.Empty)


def test_a_primary_that_is_killed_while_frozen_leaves_nothing_frozen(cluster: LocalCluster, hooks: Hooks) -> None:
    hooks.configure(a=("true", "true"))
    freeze(cluster, "a")
    cluster.kill("primary")
    hooks.wait_for("thaw a", timeout_s=2)


def test_a_killed_holder_of_the_freeze_is_stood_in_for(cluster: LocalCluster, hooks: Hooks) -> None:
    hooks.configure(a=("true", "true"))
    frozen = freeze(cluster, "a")
    subprocess.run(["pkill", "-9", "-P", str(cluster.env["primary"]["pid"]), "-f", "primary.freezer"], check=True)
    hooks.wait_for("thaw a", timeout_s=2)
    with pytest.raises(Refused, match="the freeze had ended before"):
        primary_call(cluster, "Thaw", frozen, common_pb2.Empty)


def test_a_freeze_that_ended_too_early_leaves_no_snapshot(
    cluster: LocalCluster, hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks.configure(a=("true", "true"))
    taken = []

    async def take_slowly(*arguments: Any, **options: Any) -> list[standby_pb2.Snapshot]:
        made = await create_snapshots(*arguments, **options)
        taken.extend(made)
        await asyncio.sleep(LIMIT_S + 0.5)
        return made

    async def quiesced() -> None:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            primary, standby = nodes.data_nodes
            await create_quiesced(primary, standby, ("a",), Kind(name="late"))

    monkeypatch.setattr("stillpoint.cli.snapshot_calls.create_snapshots", take_slowly)
    with pytest.raises(Refused, match="the freeze had ended before"):
        asyncio.run(quiesced())
    assert [each.name for each in taken] == ["late"]
    assert cluster.cli("snapshot", "list") == []


def test_without_a_hook_a_volume_cannot_be_quiesced(cluster: LocalCluster) -> None:
    failed = cluster.run("snapshot", "create", "a", "--quiesce")
    assert failed.code == 1
    assert failed.error == "volume 'a' has no freeze hook; add one under quiesce: hooks: in the primary's YAML"
