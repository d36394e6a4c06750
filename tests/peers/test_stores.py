"""Stores made by standbyctl: of several files, of a device, with each form of map, shared by volumes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("qemu-io", "nbdcopy"), pytest.mark.timeout(240)]

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 8 * MIB


@pytest.fixture
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    for volume in ("one", "two"):
        local_cluster.cli("volume", "create", volume, "--size", str(SIZE))
    yield local_cluster
    for volume in ("one", "two"):
        local_cluster.run("volume", "delete", volume, "--force")
    for store in local_cluster.cli("store", "list"):
        local_cluster.run("store", "delete", store["name"])


def write(cluster: LocalCluster, volume: str, pattern: int) -> None:
    uri = f"{cluster.env['primary']['nbd']}/{volume}"
    command = ["qemu-io", "-f", "raw", "-c", f"write -P {pattern} 0 {SIZE}", "-c", "flush", uri]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def read(cluster: LocalCluster, snapshot: str) -> bytes:
    uri = f"{cluster.env['standby']['nbd']}/{snapshot}"
    return subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True, timeout=60).stdout


@pytest.mark.parametrize("form", ["array", "hash", "ordered", "unordered"])
def test_two_volumes_share_a_store_of_several_files_with_any_form_of_map(
    cluster: LocalCluster, tmp_path: Path, form: str
) -> None:
    files = [tmp_path / "a.store", tmp_path / "b.store"]
    options = [argument for file in files for argument in ("--file", str(file))]
    made = cluster.cli("store", "create", "shared", *options, "--size", "64MiB", "--map", form)
    assert (made["kind"], made["map"]) == ("file", form)
    assert 56 * MIB < made["size"] <= 64 * MIB  # room for blocks: all but the log
    assert made["paths"] == [str(file) for file in files]
    for volume in ("one", "two"):
        write(cluster, volume, 1)
    cluster.cli("snapshot", "create", "one", "two", "--name", "s", "--store", "shared")
    for volume in ("one", "two"):
        write(cluster, volume, 2)
    assert read(cluster, "one@s") == read(cluster, "two@s") == b"\1" * SIZE
    (listed,) = [store for store in cluster.cli("store", "list") if store["name"] == "shared"]
    assert listed["used_bytes"] == 2 * SIZE
    refused = cluster.run("store", "delete", "shared")
    assert refused.code == 1
    assert "one, two" in refused.error


def test_a_store_grows_by_request_and_by_itself(cluster: LocalCluster, tmp_path: Path) -> None:
    for name, options in (("asked", []), ("itself", ["--auto-extend", "64MiB"])):
        path = tmp_path / f"{name}.store"
        made = cluster.cli("store", "create", name, "--file", str(path), "--size", "4MiB", *options)
        assert made["size"] <= 4 * MIB
    assert cluster.cli("store", "extend", "asked", "--size", "32MiB")["size"] > 24 * MIB
    write(cluster, "one", 1)
    write(cluster, "two", 1)
    cluster.cli("snapshot", "create", "one", "--name", "s", "--store", "asked")
    cluster.cli("snapshot", "create", "two", "--name", "s", "--store", "itself")
    write(cluster, "one", 2)
    write(cluster, "two", 2)
    assert read(cluster, "one@s") == read(cluster, "two@s") == b"\1" * SIZE
    smaller = cluster.run("store", "extend", "asked", "--size", "1MiB")
    assert smaller.code == 1
    assert smaller.error


def test_status_says_how_full_a_store_is_also_after_a_restart(own_cluster: LocalCluster, tmp_path: Path) -> None:
    own_cluster.cli("volume", "create", "one", "--size", str(2 * SIZE))
    uri = f"{own_cluster.env['primary']['nbd']}/one"

    def write(pattern: int, offset: int, length: int) -> None:
        command = ["qemu-io", "-f", "raw", "-c", f"write -P {pattern} {offset} {length}", "-c", "flush", uri]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    write(9, 0, 2 * SIZE)  # blocks of zeroes would take no room
    size = own_cluster.cli("store", "create", "tight", "--file", tmp_path / "tight", "--size", "14MiB")["size"]
    own_cluster.cli("snapshot", "create", "one", "--name", "s", "--store", "tight")
    began = 0
    for level, code in ((70, 0), (85, 1), (95, 1)):
        ended = -(-size * level // (100 * BLOCK)) * BLOCK
        write(1, began, ended - began)
        began = ended
        if level == 95:
            own_cluster.kill("standby")
            own_cluster.start("standby")
            own_cluster.wait_in_sync("one")
        told = own_cluster.run("--json", "status")
        (store,) = [each for each in told.document["stores"] if each["name"] == "tight"]
        assert (told.code, store["warning_percent"]) == (code, level)
        lines = told.document["problems" if code else "notices"]
        assert len(lines) == 1
        assert lines[0].startswith(f"store tight is {store['used_percent']}% full")
        assert lines[0] in own_cluster.run("status").stdout


def test_a_store_on_a_device_takes_the_size_of_the_device(cluster: LocalCluster, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    made = cluster.cli("store", "create", "disk", "--device", str(disk))
    assert made["paths"] == [str(disk)]
    assert 24 * MIB < made["size"] <= 32 * MIB
    taken = cluster.run("store", "create", "again", "--device", str(disk))
    assert (taken.code, taken.error) == (1, f"store 'again': {disk} belongs to store 'disk'")
    mirror = cluster.env["volumes"]["one"]["mirror_path"]
    taken = cluster.run("store", "create", "again", "--device", mirror)
    assert (taken.code, taken.error) == (1, f"store 'again': {mirror} belongs to the mirror of 'one'")
    missing = cluster.run("store", "create", "again", "--device", str(tmp_path / "missing"))
    assert missing.code == 1
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "options", [[], ["--memory", "1MiB", "--device", "/dev/x"], ["--file", "/x"], ["--device", "/x", "--size", "1MiB"]]
)
def test_options_that_contradict_each_other_are_wrong_usage(cluster: LocalCluster, options: list[str]) -> None:
    failed = cluster.run("store", "create", "x", *options)
    assert failed.code == 2
    assert failed.error
