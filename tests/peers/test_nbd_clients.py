"""Clients that others wrote, against our NBD server.

Every test takes `volume`, a writable export of VOLUME_SIZE bytes that reads as zeroes at first. `VOLUMES` says what
may stand behind it; a further kind is one more entry.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support import filesystems
from tests.support.cluster import LocalCluster
from tests.support.filesystems import loop_device, mounted
from tests.support.nbd import serve_file
from tests.support.requirements import requires_fuse, requires_loop_devices, requires_root, requires_tools

VOLUME_SIZE = 64 << 20
TIMEOUT_S = 90


@contextlib.contextmanager
def plain_file(folder: Path) -> Iterator[str]:
    """The plain server on one file."""
    with (folder / "disk").open("wb") as file:
        file.truncate(VOLUME_SIZE)
    with serve_file("--file", folder / "disk", "--export", "vol1") as (uri, _):
        yield uri


@contextlib.contextmanager
def several_files_on_a_unix_socket(folder: Path) -> Iterator[str]:
    """The plain server on two files as one disk."""
    paths = [folder / "first", folder / "second"]
    for path, size in zip(paths, (VOLUME_SIZE // 4 + 512, VOLUME_SIZE * 3 // 4 - 512), strict=True):
        with path.open("wb") as file:
            file.truncate(size)
    arguments = [argument for path in paths for argument in ("--file", path)]
    with serve_file(*arguments, "--export", "vol1", "--unix", folder / "nbd.sock") as (uri, _):
        yield uri


@contextlib.contextmanager
def mirrored(cluster: LocalCluster) -> Iterator[str]:
    """A volume of a primary, mirrored to its standby; in the end both copies must be the same."""
    cluster.cli("volume", "create", "vol1", "--size", str(VOLUME_SIZE))
    uri = f"{cluster.env['primary']['nbd']}/vol1"
    yield uri
    run("qemu-io", "-f", "raw", "-c", "flush", uri)
    paths = cluster.env["volumes"]["vol1"]
    run("cmp", paths["primary_path"], paths["mirror_path"])
    cluster.cli("volume", "delete", "vol1", "--force")


VOLUMES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "plain file": plain_file,
    "several files on a unix socket": several_files_on_a_unix_socket,
}


@pytest.fixture(params=[*VOLUMES, "mirrored volume"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URI of a writable, empty export."""
    if request.param in VOLUMES:
        opened = VOLUMES[request.param](tmp_path)
    else:
        opened = mirrored(request.getfixturevalue("local_cluster"))
    with opened as uri:
        yield uri


def run(*command: str | Path) -> str:
    """Run a tool that must succeed; returns what it printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file of the volume's size with data, zeroes and holes in it."""
    choose = random.Random(7)
    path = tmp_path / "image"
    with path.open("wb") as file:
        for _ in range(20):
            file.seek(choose.randrange(VOLUME_SIZE >> 12) << 12)
            file.write(choose.randbytes(min(choose.randrange(400_000), VOLUME_SIZE - file.tell())))
        file.truncate(VOLUME_SIZE)
    return path


@requires_tools("nbdinfo")
def test_nbdinfo_sees_what_the_export_can_do(volume: str) -> None:
    export = json.loads(run("nbdinfo", "--json", volume))["exports"][0]
    assert export["export-size"] == VOLUME_SIZE
    assert export["export-name"] == "vol1"
    assert export["contexts"] == ["base:allocation"]
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_cache", "can_df", "can_multi_conn"):
        assert export[ability], ability
    assert not export["is_read_only"]
    assert export["block_size_maximum"] == 32 << 20


@requires_tools("nbdinfo")
def test_nbdinfo_lists_the_export(volume: str) -> None:
    names = [export["export-name"] for export in json.loads(run("nbdinfo", "--list", "--json", volume))["exports"]]
    assert "vol1" in names


@requires_tools("nbdinfo", "qemu-io")
def test_nbdinfo_maps_data_and_holes(volume: str) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 1 4M 1M", volume)
    extents = json.loads(run("nbdinfo", "--map", "--json", volume))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, 4 << 20, 3),
        (4 << 20, 1 << 20, 0),
        (5 << 20, VOLUME_SIZE - (5 << 20), 3),
    ]


@requires_tools("nbdcopy")
def test_nbdcopy_copies_in_and_out(volume: str, image: Path, tmp_path: Path) -> None:
    run("nbdcopy", "--flush", image, volume)
    run("nbdcopy", volume, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@requires_tools("nbdcopy")
def test_nbdcopy_with_its_largest_requests_over_one_connection(volume: str, image: Path, tmp_path: Path) -> None:
    options = ("--synchronous", "--request-size=33554432")
    run("nbdcopy", *options, image, volume)
    run("nbdcopy", *options, volume, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@requires_tools("qemu-img")
def test_qemu_img_knows_the_size(volume: str) -> None:
    info = json.loads(run("qemu-img", "info", "--output=json", volume))
    assert info["virtual-size"] == VOLUME_SIZE


@requires_tools("qemu-img")
def test_qemu_img_converts_in_and_out_and_compares(volume: str, image: Path, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, volume)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, volume)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", volume, tmp_path / "copy.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, tmp_path / "copy.qcow2")


@requires_tools("qemu-io")
@pytest.mark.parametrize(
    "commands",
    [
        ["write -P 0x11 0 64k", "read -P 0x11 0 64k", "read -P 0 64k 64k"],
        ["write -f -P 0x22 1000 3000", "read -P 0x22 1000 3000", "read -P 0 0 1000", "read -P 0 4000 96"],
        ["write -P 0x33 0 1M", "write -z 4k 8k", "read -P 0x33 0 4k", "read -P 0 4k 8k", "read -P 0x33 12k 4k"],
        ["write -P 0x44 0 1M", "write -z -u 64k 64k", "read -P 0 64k 64k", "read -P 0x44 128k 4k"],
        ["write -P 0x55 0 1M", "discard 0 512k", "read -P 0 0 512k", "read -P 0x55 512k 512k"],
        ["write -P 0x66 0 32M", "read -P 0x66 0 32M", "flush"],
        ["aio_write -P 0x77 0 4M", "aio_write -P 0x78 4M 4M", "aio_flush", "read -P 0x77 0 4M", "read -P 0x78 4M 4M"],
        ["writev -P 0x79 512 4k 8k 16k", "read -P 0x79 512 28k"],
    ],
    ids=["pattern", "fua", "zeroes", "zeroes and trim", "discard", "largest", "concurrent", "vector"],
)
def test_qemu_io_reads_back_what_it_wrote(volume: str, commands: list[str]) -> None:
    arguments = [argument for command in commands for argument in ("-c", command)]
    assert "verification failed" not in run("qemu-io", "-f", "raw", *arguments, volume)


@requires_tools("fio")
@pytest.mark.parametrize("block_size", ["4k", "512-128k", "1m"])
def test_fio_verifies_every_block(volume: str, block_size: str, tmp_path: Path) -> None:
    option = "--bsrange" if "-" in block_size else "--bs"
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={volume}", "--rw=randwrite", f"{option}={block_size}",
        "--iodepth=32", f"--size={VOLUME_SIZE // 2}", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
        f"--aux-path={tmp_path}", "--verify_state_save=0",
    )  # fmt: skip


@requires_root
@requires_fuse
@requires_loop_devices
@requires_tools(*filesystems.TOOLS, "fstrim", "nbdinfo")
def test_a_file_system_lives_on_the_volume(volume: str, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(5 << 20)

    def fill(root: Path) -> None:
        (root / "file").write_bytes(data)
        (root / "doomed").write_bytes(data * 3)

    def thin(root: Path) -> None:
        assert (root / "file").read_bytes() == data
        (root / "doomed").unlink()
        os.sync()
        run("fstrim", "-v", root)

    with loop_device(volume, tmp_path) as device:
        run("mkfs.ext4", "-q", "-F", device)
        with mounted(device, tmp_path) as root:
            fill(root)
        run("e2fsck", "-fn", device)
    before = allocated(volume)
    with loop_device(volume, tmp_path) as device:
        with mounted(device, tmp_path) as root:
            thin(root)
    assert allocated(volume) <= before - 2 * len(data)
    with loop_device(volume, tmp_path) as device:
        run("e2fsck", "-fn", device)


@requires_root
@requires_fuse
@requires_loop_devices
@requires_tools(*filesystems.TOOLS, "qemu-io")
def test_a_file_system_is_read_from_a_snapshot_while_the_volume_goes_on(
    local_cluster: LocalCluster, tmp_path: Path
) -> None:
    old, new = random.Random(4).randbytes(3 << 20), random.Random(5).randbytes(3 << 20)
    with mirrored(local_cluster) as volume:
        with loop_device(volume, tmp_path) as device:
            run("mkfs.ext4", "-q", "-F", device)
            with mounted(device, tmp_path) as root:
                (root / "file").write_bytes(old)
        local_cluster.cli("snapshot", "create", "vol1", "--name", "then")
        with loop_device(volume, tmp_path) as device:
            with mounted(device, tmp_path) as root:
                (root / "file").write_bytes(new)
        snapshot = f"{local_cluster.env['standby']['nbd']}/vol1@then"
        with loop_device(snapshot, tmp_path, read_only=True) as device:
            run("e2fsck", "-fn", device)
            with mounted(device, tmp_path, options="ro") as root:
                assert (root / "file").read_bytes() == old
        with loop_device(volume, tmp_path) as device:
            with mounted(device, tmp_path) as root:
                assert (root / "file").read_bytes() == new


def allocated(volume: str) -> int:
    """Bytes of the volume that are not holes."""
    extents = json.loads(run("nbdinfo", "--map", "--json", volume))
    return sum(extent["length"] for extent in extents if not extent["type"] & 1)


# --- of the plain server alone


def activated(*arguments: str | Path) -> list[str]:
    """The words with which libnbd's tools start the server themselves, by socket activation."""
    return ["--", "[", sys.executable, "-m", "stillpoint.nbd", *map(str, arguments), "]"]


@requires_tools("nbdinfo")
def test_socket_activation_serves_whoever_starts_us(image: Path) -> None:
    export = json.loads(run("nbdinfo", "--json", *activated("--file", image, "--read-only")))["exports"][0]
    assert export["export-size"] == VOLUME_SIZE
    assert export["is_read_only"]


@requires_tools("nbdcopy")
def test_nbdcopy_between_two_servers_it_starts(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with target.open("wb") as file:
        file.truncate(VOLUME_SIZE)
    run("nbdcopy", *activated("--file", image), *activated("--file", target)[1:])
    assert target.read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "/does/not/exist"], "/does/not/exist: does not exist"),
        (["--file", "/tmp"], "/tmp: is neither a regular file nor a block device"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_status_1(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "stillpoint.nbd", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"python -m stillpoint.nbd: {message}\n"


def test_a_port_and_a_file_in_use_are_named(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    shutil.copy(tmp_path / "disk", tmp_path / "other")
    with serve_file("--file", tmp_path / "disk") as (uri, _):
        port = uri.rsplit(":", 1)[1].rstrip("/")
        command = [sys.executable, "-m", "stillpoint.nbd", "--port", port, "--file"]
        for name, message in (("other", "another process listens there"), ("disk", "is in use by another process")):
            done = subprocess.run(
                [*command, str(tmp_path / name)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
            assert done.returncode == 1
            assert done.stderr.count("\n") == 1
            assert message in done.stderr
