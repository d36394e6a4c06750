"""standbyctl against real nodes: what a command prints, and that a mistake is one line, an exit code and no change."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillpoint.cli.backup_calls import list_backups
from stillpoint.cli.cluster import load_cluster
from stillpoint.cli.nodes import Nodes
from stillpoint.cli.snapshot import snapshot_id
from stillpoint.cli.volume import list_volumes
from stillpoint.wire.v1 import common_pb2, standby_pb2
from tests.support.cluster import LocalCluster, run_standbyctl
from tests.support.requirements import requires_tools

pytestmark = pytest.mark.timeout(240)

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The shared cluster with a volume `vol1`, a smaller one `small`, a snapshot `vol1@s1` and a store `fast`."""
    local_cluster.cli("volume", "create", "vol1", "--size", "8MiB")
    local_cluster.cli("volume", "create", "small", "--size", "1MiB")
    local_cluster.cli("store", "create", "fast", "--memory", "4MiB")
    local_cluster.cli("snapshot", "create", "vol1", "--name", "s1", "--store", "fast")
    yield local_cluster
    for volume in ("vol1", "small"):
        local_cluster.run("volume", "delete", volume, "--force")
    local_cluster.run("store", "delete", "fast")


@pytest.fixture
def backup_id(cluster: LocalCluster) -> Iterator[str]:
    made: str = cluster.cli("backup", "run", "vol1", "--snapshot", "s1")["id"]
    yield made
    cluster.run("backup", "delete", made)


def all_there_is(cluster: LocalCluster) -> dict[str, list[str]]:
    """The names of everything in the cluster, asked without standbyctl, which takes half a second to start."""

    async def ask() -> dict[str, list[str]]:
        async with Nodes(load_cluster(cluster.cluster_file)) as nodes:
            snapshots = await nodes.standby.call(
                "ListSnapshots", standby_pb2.ListSnapshotsRequest(), standby_pb2.SnapshotList
            )
            standby = await nodes.standby.call("GetStatus", common_pb2.Empty(), standby_pb2.StandbyStatus)
            return {
                "volumes": sorted(volume.name for volume in await list_volumes(nodes)),
                "mirrors": sorted(mirror.volume for mirror in standby.mirrors),
                "snapshots": sorted(map(snapshot_id, snapshots.snapshots)),
                "stores": sorted(store.name for store in standby.stores),
                "backups": sorted(backup.id for backup in (await list_backups(nodes)).backups),
            }

    return asyncio.run(ask())


@pytest.fixture
def fails(cluster: LocalCluster) -> Callable[..., str]:
    """Run a command that must fail with one line and change nothing; the line."""

    def run(*arguments: str | Path, code: int = 1) -> str:
        before = all_there_is(cluster)
        result = cluster.run(*arguments)
        assert (result.code, result.stdout) == (code, ""), result
        assert all_there_is(cluster) == before
        return result.error

    return run


# What commands print


def test_env_has_exactly_what_scripts_rely_on(cluster: LocalCluster) -> None:
    env = cluster.env
    assert set(env) == {"cluster", "primary", "standby", "backup", "volumes", "tls"}
    assert set(env["tls"]) == {"admin", "client"}
    assert set(env["primary"]) == set(env["backup"]) == {"pid", "grpc", "nbd"}
    assert set(env["standby"]) == {"pid", "export_pid", "grpc", "nbd", "volume_nbd"}
    for node in ("primary", "standby", "backup"):
        os.kill(env[node]["pid"], 0)
        assert env[node]["nbd"].startswith("nbd://127.0.0.1:")
        assert not env[node]["grpc"].startswith("nbd")
    os.kill(env["standby"]["export_pid"], 0)
    paths = env["volumes"]["vol1"]
    assert Path(paths["primary_path"]).stat().st_size == Path(paths["mirror_path"]).stat().st_size == 8 * MIB
    assert paths["primary_path"] != paths["mirror_path"]


@pytest.mark.parametrize("noun", ["volume", "snapshot", "store", "backup"])
def test_list_is_a_json_list_wherever_the_option_stands(cluster: LocalCluster, noun: str) -> None:
    before, between, after = (
        cluster.run("--json", noun, "list"),
        cluster.run(noun, "--json", "list"),
        cluster.run(noun, "list", "--json"),
    )
    assert isinstance(before.document, list)
    assert len(before.document) == len(between.document) == len(after.document)
    assert before.stderr == between.stderr == after.stderr == ""


def test_volume_create_answers_with_the_volume_in_sync(cluster: LocalCluster) -> None:
    made = cluster.cli("volume", "create", "made", "--size", "1MiB", "--block-size", "4KiB", "--mode", "durable")
    try:
        assert (made["name"], made["size"], made["block_size"], made["mode"]) == ("made", MIB, 4096, "durable")
        assert made["pair"]["state"] == "in_sync"
        assert cluster.cli("volume", "show", "made")["uuid"] == made["uuid"]
    finally:
        assert cluster.cli("volume", "delete", "made") == {"deleted": "made"}
    assert "made" not in [volume["name"] for volume in cluster.cli("volume", "list")]


def test_volume_on_named_devices_has_their_size(cluster: LocalCluster, tmp_path: Path) -> None:
    devices = [tmp_path / name for name in ("a", "b", "m")]
    for device, size in zip(devices, (MIB, 2 * MIB, 3 * MIB), strict=True):
        device.write_bytes(bytes(size))
    a, b, m = devices
    made = cluster.cli("volume", "create", "joined", "--device", a, "--device", b, "--mirror-device", m)
    try:
        assert made["size"] == 3 * MIB
        assert made["device_paths"] == [str(a), str(b)]
        assert cluster.env["volumes"]["joined"] == {"primary_path": [str(a), str(b)], "mirror_path": str(m)}
    finally:
        cluster.cli("volume", "delete", "joined")


def test_snapshot_create_answers_with_its_id(cluster: LocalCluster) -> None:
    made = cluster.cli("snapshot", "create", "vol1", "--name", "s2")
    assert (made["id"], made["volume"], made["name"], made["state"]) == ("vol1@s2", "vol1", "s2", "active")
    listed = {each["id"]: each for each in cluster.cli("snapshot", "list", "vol1")}
    assert listed["vol1@s2"]["uuid"] == made["uuid"]
    assert cluster.cli("snapshot", "show", "vol1@s2")["in_sync"] is True
    assert cluster.cli("snapshot", "delete", "vol1@s2") == {"deleted": "vol1@s2"}
    assert "vol1@s2" not in [each["id"] for each in cluster.cli("snapshot", "list")]


def test_snapshot_of_several_volumes_is_one_instant(cluster: LocalCluster) -> None:
    made = cluster.cli("snapshot", "create", "vol1", "small", "--name", "both")["snapshots"]
    assert sorted(each["id"] for each in made) == ["small@both", "vol1@both"]
    assert all(each["in_sync"] for each in made)
    for each in made:
        cluster.cli("snapshot", "delete", each["id"])


def test_snapshot_without_a_name_gets_one(cluster: LocalCluster) -> None:
    made = cluster.cli("snapshot", "create", "vol1")
    assert made["id"] == f"vol1@{made['name']}" and made["name"]
    cluster.cli("snapshot", "delete", made["id"])


def test_store_in_a_file(cluster: LocalCluster, tmp_path: Path) -> None:
    path = tmp_path / "preserved"
    made = cluster.cli("store", "create", "filed", "--file", path, "--size", "8MiB")
    assert made["kind"] == "file"
    # A part of the file is the store's own bookkeeping.
    assert 0 < made["size"] <= 8 * MIB
    assert path.exists()
    assert cluster.cli("store", "delete", "filed") == {"deleted": "filed"}


def test_status_of_a_healthy_cluster_is_0(cluster: LocalCluster) -> None:
    document = cluster.cli("status")
    assert document["healthy"] is True and document["problems"] == []
    assert all(node["up"] for node in document["nodes"].values())
    assert cluster.cli("status", "vol1")["volumes"][0]["name"] == "vol1"


def test_tables_in_a_pipe_are_plain_text_of_80_columns(cluster: LocalCluster, backup_id: str) -> None:
    for arguments in (
        ["status"],
        ["volume", "list"],
        ["snapshot", "list"],
        ["mirror", "status"],
        ["backup", "list"],
    ):
        text = cluster.cli(*arguments, json=False)
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80, text


def test_mirror_status_is_an_object(cluster: LocalCluster) -> None:
    mirrors = {each["volume"]: each for each in cluster.cli("mirror", "status")["mirrors"]}
    assert mirrors["vol1"]["state"] == "in_sync"
    assert mirrors["vol1"]["snapshot_count"] == 1


@requires_tools("nbdcopy")
def test_what_was_written_comes_back_by_snapshot_and_by_backup(cluster: LocalCluster, tmp_path: Path) -> None:
    env = cluster.env
    cluster.cli("volume", "create", "data", "--size", "4MiB")
    try:
        image = tmp_path / "image"
        image.write_bytes(os.urandom(MIB) + bytes(2 * MIB) + os.urandom(MIB))
        nbdcopy(image, f"{env['primary']['nbd']}/data")
        cluster.cli("snapshot", "create", "data", "--name", "then")
        other = tmp_path / "other"
        other.write_bytes(os.urandom(4 * MIB))
        nbdcopy(other, f"{env['primary']['nbd']}/data")
        nbdcopy(f"{env['standby']['nbd']}/data@then", tmp_path / "from-snapshot")
        assert (tmp_path / "from-snapshot").read_bytes() == image.read_bytes()

        made = cluster.cli("backup", "run", "data", "--snapshot", "data@then")
        assert made["volume"] == "data" and made["size"] == 4 * MIB
        assert made["id"] in [each["id"] for each in cluster.cli("backup", "list", "data")]
        assert cluster.cli("backup", "show", made["id"])["snapshot"] == "then"
        assert cluster.cli("backup", "verify", made["id"])["ok"] is True
        assert made["id"] in [each["id"] for each in cluster.cli("backup", "verify")["verified"]]

        restored, by_node = tmp_path / "restored", tmp_path / "restored-by-the-node"
        assert cluster.cli("backup", "restore", made["id"], restored)["size"] == 4 * MIB
        cluster.cli("backup", "restore", made["id"], by_node, "--on-node")
        assert restored.read_bytes() == by_node.read_bytes() == image.read_bytes()

        # Into a volume: the bytes travel from here to the primary.
        cluster.cli("backup", "restore", made["id"], f"{env['primary']['nbd']}/data", "--force")
        nbdcopy(f"{env['primary']['nbd']}/data", tmp_path / "volume")
        assert (tmp_path / "volume").read_bytes() == image.read_bytes()
        assert cluster.cli("backup", "delete", made["id"]) == {"deleted": made["id"]}
    finally:
        cluster.cli("volume", "delete", "data", "--force")


def nbdcopy(source: str | Path, target: str | Path) -> None:
    subprocess.run(["nbdcopy", "--flush", str(source), str(target)], check=True, timeout=60)


# Bad input


def test_a_volume_that_exists(fails: Callable[..., str]) -> None:
    assert "vol1" in fails("volume", "create", "vol1", "--size", "1MiB")


@pytest.mark.parametrize("size", ["0", "-1", "1.5", "64XB", "", "0MiB"])
def test_a_size_that_makes_no_sense_is_wrong_usage(fails: Callable[..., str], size: str) -> None:
    fails("volume", "create", "bad", "--size", size, code=2)


def test_a_volume_without_size_or_device_is_wrong_usage(fails: Callable[..., str]) -> None:
    fails("volume", "create", "bad", code=2)


def test_a_size_that_is_not_whole_blocks(fails: Callable[..., str]) -> None:
    assert "block" in fails("volume", "create", "bad", "--size", "100000")


@pytest.mark.parametrize("block_size", ["256", "1000", "2MiB", "8GiB"])
def test_a_block_size_out_of_bounds(fails: Callable[..., str], block_size: str) -> None:
    assert "block" in fails("volume", "create", "bad", "--size", "8GiB", "--block-size", block_size)


@pytest.mark.parametrize("name", ["a/b", "../up", "a@b", ".hidden", "x" * 65, "a b", "a\nb", "ä"])
def test_a_name_that_is_not_allowed(fails: Callable[..., str], name: str) -> None:
    fails("volume", "create", name, "--size", "1MiB")
    fails("snapshot", "create", "vol1", "--name", name)
    fails("store", "create", name, "--memory", "1MiB")


def test_a_device_that_is_too_small(fails: Callable[..., str], tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.write_bytes(bytes(MIB))
    assert "small" in fails("volume", "create", "bad", "--size", "2MiB", "--device", device)
    assert "small" in fails("volume", "create", "bad", "--size", "2MiB", "--mirror-device", device)
    assert device.read_bytes() == bytes(MIB)


def test_a_device_that_is_not_there(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing" in fails("volume", "create", "bad", "--size", "1MiB", "--device", tmp_path / "nothing")
    assert "nothing" in fails("volume", "create", "bad", "--size", "1MiB", "--mirror-device", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_device_that_is_in_use(cluster: LocalCluster, fails: Callable[..., str]) -> None:
    paths = cluster.env["volumes"]["vol1"]
    fails("volume", "create", "bad", "--size", "1MiB", "--device", paths["primary_path"])
    fails("volume", "create", "bad", "--size", "1MiB", "--mirror-device", paths["mirror_path"])


def test_a_volume_that_is_not_there(fails: Callable[..., str]) -> None:
    for arguments in (
        ["volume", "show", "none"],
        ["volume", "delete", "none"],
        ["snapshot", "create", "none"],
        ["snapshot", "create", "vol1", "none"],
        ["backup", "run", "none"],
        ["status", "none"],
    ):
        assert "none" in fails(*arguments)


def test_a_volume_whose_mirror_holds_a_snapshot_is_not_deleted_without_force(fails: Callable[..., str]) -> None:
    assert "vol1" in fails("volume", "delete", "vol1")


def test_a_snapshot_that_exists_is_not_there_or_is_no_snapshot(fails: Callable[..., str]) -> None:
    assert "s1" in fails("snapshot", "create", "vol1", "--name", "s1")
    assert "s9" in fails("snapshot", "show", "vol1@s9")
    assert "s9" in fails("snapshot", "delete", "vol1@s9")
    assert "s9" in fails("backup", "run", "vol1", "--snapshot", "s9")
    fails("snapshot", "show", "vol1", code=2)
    fails("snapshot", "create", code=2)


def test_a_store_that_exists_is_not_there_is_in_use_or_makes_no_sense(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    assert "fast" in fails("store", "create", "fast", "--memory", "1MiB")
    assert "fast" in fails("store", "delete", "fast")
    assert "none" in fails("store", "delete", "none")
    assert "none" in fails("snapshot", "create", "vol1", "--store", "none")
    fails("store", "create", "bad", code=2)
    fails("store", "create", "bad", "--memory", "0", code=2)
    fails("store", "create", "bad", "--file", tmp_path / "s", code=2)
    fails("store", "create", "bad", "--memory", "1MiB", "--file", tmp_path / "s", "--size", "1MiB", code=2)
    fails("store", "create", "bad", "--file", tmp_path / "no" / "folder", "--size", "1MiB")


def test_a_backup_that_is_not_there(fails: Callable[..., str], tmp_path: Path) -> None:
    for arguments in (["show"], ["verify"], ["delete"]):
        assert "none" in fails("backup", *arguments, "none")
    fails("backup", "restore", "none", tmp_path / "out")
    fails("backup", "restore", "../../etc/passwd", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [[], ["--on-node"]])
def test_a_file_that_exists_is_not_restored_over_without_force(
    cluster: LocalCluster, fails: Callable[..., str], backup_id: str, tmp_path: Path, where: list[str]
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    assert "--force" in fails("backup", "restore", backup_id, out, *where)
    assert out.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [out]
    cluster.cli("backup", "restore", backup_id, out, "--force", *where)
    assert out.stat().st_size == 8 * MIB


@pytest.mark.parametrize("where", [[], ["--on-node"]])
def test_a_target_that_cannot_take_the_backup(
    cluster: LocalCluster, fails: Callable[..., str], backup_id: str, tmp_path: Path, where: list[str]
) -> None:
    primary = cluster.env["primary"]["nbd"]
    assert "small" in fails("backup", "restore", backup_id, f"{primary}/small", "--force", *where)
    fails("backup", "restore", backup_id, f"{primary}/none", *where)
    fails("backup", "restore", backup_id, "nbd://127.0.0.1:1/vol1", *where)
    fails("backup", "restore", backup_id, "http://127.0.0.1/vol1", *where)
    fails("backup", "restore", backup_id, tmp_path / "no" / "folder", *where)
    fails("backup", "restore", backup_id, tmp_path, *where)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_no_target(cluster: LocalCluster, fails: Callable[..., str], backup_id: str) -> None:
    fails("backup", "restore", backup_id, f"{cluster.env['standby']['nbd']}/vol1@s1", "--force")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["volume"], ["volume", "create"], ["volume", "list", "--nonsense"], ["local", "kill", "nobody"]],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    result = run_standbyctl(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.stderr
    if arguments != ["volume"]:
        assert "--help" in result.error


def test_an_unknown_key_in_the_cluster_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("primary: { grcp: '127.0.0.1:1', nbd: '127.0.0.1:2' }\n")
    result = run_standbyctl("--cluster", file, "volume", "list")
    assert result.code == 1
    assert "did you mean 'grpc'" in result.error


def test_the_cluster_is_found_by_variable_and_by_folder(cluster: LocalCluster, tmp_path: Path) -> None:
    by_folder = run_standbyctl("--json", "volume", "list", cwd=cluster.directory)
    by_variable = run_standbyctl(
        "--json", "volume", "list", cwd=tmp_path, env={"STILLPOINT_CLUSTER": str(cluster.cluster_file)}
    )
    by_nothing = run_standbyctl("--json", "volume", "list", cwd=tmp_path)
    assert by_folder.code == by_variable.code == 0
    assert len(by_folder.document) == len(by_variable.document)
    assert by_nothing.code == 1 and "--cluster" in by_nothing.error
