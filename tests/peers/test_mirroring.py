"""The pair under real clients and real faults, over both carriers of the data link."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillpoint.nbd.client import NbdClient
from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

MIB = 1 << 20
SIZE = 32 * MIB

pytestmark = [requires_tools("nbdcopy", "fio", "qemu-img", "qemu-io"), pytest.mark.timeout(240)]


@pytest.fixture(params=["tcp", "grpc"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster.up(tmp_path / "cluster", f"vol:{SIZE}", carrier=request.param) as cluster:
        yield cluster


@pytest.fixture
def tcp_pair(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster.up(tmp_path / "cluster", f"vol:{SIZE}") as cluster:
        yield cluster


def volume_uri(cluster: LocalCluster) -> str:
    return f"{cluster.env['primary']['nbd']}/vol"


def snapshot_uri(cluster: LocalCluster, name: str) -> str:
    return f"{cluster.env['standby']['nbd']}/vol@{name}"


def pair_of(cluster: LocalCluster) -> dict[str, Any]:
    pair: dict[str, Any] = cluster.cli("volume", "show", "vol")["pair"]
    return pair


def wait_until(cluster: LocalCluster, state: str, *, timeout_s: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while (pair := pair_of(cluster))["state"] != state:
        assert time.monotonic() < deadline, f"still {pair}{cluster.log_tails()}"
        time.sleep(0.1)
    return pair


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, check=True, capture_output=True, timeout=120, **options)


def flush(uri: str) -> None:
    run("qemu-io", "-f", "raw", "-c", "flush", uri)


def assert_same_disk(cluster: LocalCluster) -> None:
    """After a flush the two files are equal, byte for byte."""
    flush(volume_uri(cluster))
    paths = cluster.env["volumes"]["vol"]
    run("cmp", paths["primary_path"], paths["mirror_path"])


def pid_of(cluster: LocalCluster, node: str) -> int:
    pid = cluster.env[node]["pid"]
    assert isinstance(pid, int)
    return pid


def random_image(path: Path, seed: int) -> Path:
    path.write_bytes(random.Random(seed).randbytes(SIZE))
    return path


def fill(cluster: LocalCluster, seed: int) -> bytes:
    image = random_image(cluster.directory / f"image-{seed}", seed)
    run("nbdcopy", "--flush", str(image), volume_uri(cluster))
    return image.read_bytes()


def read_snapshot(cluster: LocalCluster, name: str) -> bytes:
    return run("nbdcopy", snapshot_uri(cluster, name), "-").stdout


def test_the_main_job_from_image_to_restored_backup(pair: LocalCluster, tmp_path: Path) -> None:
    before = fill(pair, 1)
    pair.cli("snapshot", "create", "vol", "--name", "s1")
    fill(pair, 2)
    assert read_snapshot(pair, "s1") == before
    assert_same_disk(pair)
    backup = pair.cli("backup", "run", "vol")["id"]
    at_backup = Path(pair.env["volumes"]["vol"]["primary_path"]).read_bytes()
    fill(pair, 3)
    pair.cli("backup", "restore", backup, tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == at_backup
    # A restore into a live volume goes through the primary, and so to both copies.
    pair.cli("backup", "restore", backup, volume_uri(pair), "--force")
    assert Path(pair.env["volumes"]["vol"]["primary_path"]).read_bytes() == at_backup
    assert_same_disk(pair)


def test_trims_and_zeroes_are_mirrored_as_themselves(pair: LocalCluster) -> None:
    fill(pair, 4)
    uri = volume_uri(pair)
    run(
        "qemu-io", "-f", "raw", "-d", "unmap",
        "-c", "discard 1M 4M", "-c", "write -z 8M 3M", "-c", "write -z -u 16M 2M",
        "-c", "write -P 7 17M 512", "-c", "flush", uri,
    )  # fmt: skip
    assert_same_disk(pair)
    mirror = Path(pair.env["volumes"]["vol"]["mirror_path"])
    assert mirror.stat().st_blocks * 512 <= SIZE - 4 * MIB
    content = mirror.read_bytes()
    assert not any(content[MIB : 5 * MIB])
    assert not any(content[8 * MIB : 11 * MIB])
    assert content[17 * MIB : 17 * MIB + 512] == b"\x07" * 512


def test_fio_verifies_what_it_wrote_and_both_copies_agree(pair: LocalCluster, tmp_path: Path) -> None:
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={volume_uri(pair)}", "--rw=randwrite", "--bs=4k",
        "--iodepth=16", f"--size={SIZE}", "--verify=crc32c", "--fsync=32", "--randseed=9", cwd=tmp_path,
    )  # fmt: skip
    assert_same_disk(pair)


class Journal:
    """A serial writer that knows exactly what the volume held after each of its writes."""

    def __init__(self, image: bytes, seed: int) -> None:
        self.image = bytearray(image)
        self.writes: list[tuple[int, bytes]] = []
        self.acknowledged = 0
        self._generator = random.Random(seed)

    async def write_on(self, client: NbdClient, stop: asyncio.Event) -> None:
        while not stop.is_set():
            length = self._generator.choice([512, 4096, 4096, 65536, 200_000])
            offset = self._generator.randrange((SIZE - length) // 512) * 512
            data = self._generator.randbytes(length)
            self.writes.append((offset, data))
            await client.write(offset, data)
            self.acknowledged += 1

    def state_after(self, count: int) -> bytearray:
        state = bytearray(self.image)
        for offset, data in self.writes[:count]:
            state[offset : offset + len(data)] = data
        return state

    def matches(self, content: bytes, *, first: int, last: int) -> bool:
        """Whether `content` is the volume after some number of writes from `first` to `last`."""
        state = self.state_after(first)
        for count in range(first, last + 1):
            if state == content:
                return True
            if count < last:
                offset, data = self.writes[count]
                state[offset : offset + len(data)] = data
        return False


async def take_snapshots(cluster: LocalCluster, journal: Journal, count: int) -> dict[str, tuple[int, int]]:
    """Snapshots on random instants under load: for each, how many writes were acknowledged before, begun after."""
    bounds: dict[str, tuple[int, int]] = {}
    client = await NbdClient.connect(volume_uri(cluster))
    stop = asyncio.Event()
    writer = asyncio.create_task(journal.write_on(client, stop))
    generator = random.Random(11)
    try:
        for number in range(count):
            await asyncio.sleep(generator.random() * 0.1)
            first = journal.acknowledged
            await asyncio.to_thread(cluster.cli, "snapshot", "create", "vol", "--name", f"s{number}")
            bounds[f"s{number}"] = (first, len(journal.writes))
            assert not writer.done(), writer.exception()
    finally:
        stop.set()
        await writer
        await client.flush()
        await client.close()
    return bounds


def test_thirty_snapshots_under_load_stay_exact_through_overwrites_deletes_and_a_killed_standby(
    tcp_pair: LocalCluster,
) -> None:
    journal = Journal(fill(tcp_pair, 5), seed=12)
    bounds = asyncio.run(take_snapshots(tcp_pair, journal, 30))
    generator = random.Random(13)
    for number in range(3):
        fill(tcp_pair, 20 + number)
        for name in generator.sample(sorted(bounds), 5):
            tcp_pair.cli("snapshot", "delete", f"vol@{name}")
            del bounds[name]
        if number == 1:
            tcp_pair.kill("standby")
            tcp_pair.start("standby")
            wait_until(tcp_pair, "in_sync")
    assert len(bounds) == 15
    for name, (first, last) in bounds.items():
        assert journal.matches(read_snapshot(tcp_pair, name), first=first, last=last), name
    assert_same_disk(tcp_pair)


def background_writes(cluster: LocalCluster, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            "fio", "--name=load", "--ioengine=nbd", f"--uri={volume_uri(cluster)}", "--rw=randwrite", "--bs=4k",
            "--iodepth=8", f"--size={SIZE}", "--time_based", f"--runtime={seconds}", "--fsync=64",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cluster.directory,
    )  # fmt: skip


def test_a_killed_standby_comes_back_and_catches_up(pair: LocalCluster) -> None:
    fill(pair, 6)
    pair.cli("snapshot", "create", "vol", "--name", "before")
    content = Path(pair.env["volumes"]["vol"]["primary_path"]).read_bytes()
    load = background_writes(pair, 200)
    for _ in range(2):
        time.sleep(1.5)
        pair.kill("standby")
        time.sleep(0.5)
        assert load.poll() is None, "clients go on without the standby"
        down = pair_of(pair)
        assert (down["state"], down["dirty_bytes"] > 0) == ("disconnected", True)
        pair.start("standby")
    time.sleep(0.5)
    assert load.poll() is None
    load.terminate()
    load.wait(timeout=60)
    pair_after = wait_until(pair, "in_sync")
    assert pair_after["dirty_bytes"] == 0
    assert_same_disk(pair)
    assert read_snapshot(pair, "before") == content


def test_a_killed_primary_loses_nothing_that_was_acknowledged(pair: LocalCluster) -> None:
    journal = Journal(fill(pair, 7), seed=14)

    async def write_until_killed() -> None:
        client = await NbdClient.connect(volume_uri(pair))
        writer = asyncio.create_task(journal.write_on(client, asyncio.Event()))
        await asyncio.sleep(1.5)
        await asyncio.to_thread(pair.kill, "primary")
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever a client sees when its server dies
            await writer
        await client.close()

    asyncio.run(write_until_killed())
    paths = pair.env["volumes"]["vol"]
    # Nobody may know about the write in flight; everything acknowledged is on both nodes.
    for path in paths.values() if paths else _known_paths(pair):
        assert journal.matches(
            Path(path).read_bytes(), first=journal.acknowledged, last=len(journal.writes)
        ) or _torn_last_write(journal, Path(path).read_bytes()), path
    pair.start("primary")
    wait_until(pair, "in_sync")
    assert_same_disk(pair)


def _known_paths(cluster: LocalCluster) -> list[str]:
    return [
        str(cluster.directory / "primary/volumes/vol/disk.img"),
        str(cluster.directory / "standby/mirrors/vol/disk.img"),
    ]


def _torn_last_write(journal: Journal, content: bytes) -> bool:
    """Whether `content` differs from the last acknowledged state only within the write in flight."""
    state = journal.state_after(journal.acknowledged)
    for offset, data in journal.writes[journal.acknowledged :]:
        state[offset : offset + len(data)] = content[offset : offset + len(data)]
    return state == content


def test_a_frozen_standby_does_not_stop_the_clients_and_is_resynced(tcp_pair: LocalCluster) -> None:
    fill(tcp_pair, 8)
    pid = pid_of(tcp_pair, "standby")
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        run("qemu-io", "-f", "raw", "-c", "write -P 5 0 1M", "-c", "flush", volume_uri(tcp_pair))
        assert time.monotonic() - started < 20  # the documented time-out, and no longer
        assert pair_of(tcp_pair)["state"] == "disconnected"
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(tcp_pair, "in_sync")
    assert_same_disk(tcp_pair)


def test_the_dirty_map_survives_a_restart_of_the_primary(tcp_pair: LocalCluster) -> None:
    fill(tcp_pair, 9)
    tcp_pair.kill("standby")
    run("qemu-io", "-f", "raw", "-c", "write -P 9 3M 64k", "-c", "flush", volume_uri(tcp_pair))
    os.kill(pid_of(tcp_pair, "primary"), signal.SIGTERM)
    deadline = time.monotonic() + 20
    while tcp_pair.env["primary"]["pid"] is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tcp_pair.start("primary")
    dirty = pair_of(tcp_pair)["dirty_bytes"]
    assert 65536 <= dirty < SIZE
    tcp_pair.start("standby")
    wait_until(tcp_pair, "in_sync")
    assert_same_disk(tcp_pair)


def test_a_full_store_costs_the_snapshot_and_never_a_write(tcp_pair: LocalCluster) -> None:
    tcp_pair.cli("store", "create", "small", "--memory", "4MiB")
    fill(tcp_pair, 10)
    tcp_pair.cli("snapshot", "create", "vol", "--name", "doomed", "--store", "small")
    content = fill(tcp_pair, 11)
    doomed = tcp_pair.cli("snapshot", "show", "vol@doomed")
    assert doomed["state"] == "invalid"
    assert doomed["reason"]
    with pytest.raises(subprocess.CalledProcessError):
        run("nbdcopy", snapshot_uri(tcp_pair, "doomed"), "/dev/null")
    assert_same_disk(tcp_pair)
    tcp_pair.cli("snapshot", "create", "vol", "--name", "next", "--store", "small")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", volume_uri(tcp_pair))
    assert read_snapshot(tcp_pair, "next") == content


def test_a_dead_export_process_is_replaced_and_mirroring_never_noticed(tcp_pair: LocalCluster) -> None:
    content = fill(tcp_pair, 12)
    tcp_pair.cli("snapshot", "create", "vol", "--name", "s")
    old = tcp_pair.env["standby"]["export_pid"]
    session = pair_of(tcp_pair)["session"]
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while tcp_pair.env["standby"]["export_pid"] in (old, 0, None):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    fill(tcp_pair, 13)
    with contextlib.suppress(subprocess.CalledProcessError):
        run("nbdcopy", snapshot_uri(tcp_pair, "s"), "/dev/null")  # the first may come before it listens
    time.sleep(1)
    assert read_snapshot(tcp_pair, "s") == content
    assert pair_of(tcp_pair)["session"] == session


@pytest.mark.parametrize("mode", ["async", "durable"])
def test_the_other_acknowledgement_modes_end_with_the_same_disk(tcp_pair: LocalCluster, mode: str) -> None:
    tcp_pair.cli("volume", "create", "other", "--size", "16MiB", "--mode", mode)
    uri = f"{tcp_pair.env['primary']['nbd']}/other"
    run(
        "fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=8k", "--iodepth=16",
        "--size=16m", "--io_size=48m", "--verify=crc32c", "--fsync=50", cwd=tcp_pair.directory,
    )  # fmt: skip
    flush(uri)
    deadline = time.monotonic() + 20
    paths = tcp_pair.env["volumes"]["other"]
    while Path(paths["primary_path"]).read_bytes() != Path(paths["mirror_path"]).read_bytes():
        assert mode == "async"  # whose flush only queues the barrier
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_volume_and_its_mirror_may_lie_on_several_files(tcp_pair: LocalCluster, tmp_path: Path) -> None:
    parts = {}
    for side in ("a", "b", "c", "d"):
        parts[side] = tmp_path / f"{side}.disk"
        with parts[side].open("wb") as file:
            file.truncate(8 * MIB)
    tcp_pair.cli(
        "volume", "create", "wide", "--size", "16MiB", "--device", parts["a"], "--device", parts["b"],
        "--mirror-device", parts["c"], "--mirror-device", parts["d"],
    )  # fmt: skip
    image = tmp_path / "image"
    image.write_bytes(random.Random(3).randbytes(16 * MIB))
    run("nbdcopy", "--flush", str(image), f"{tcp_pair.env['primary']['nbd']}/wide")
    assert parts["a"].read_bytes() + parts["b"].read_bytes() == image.read_bytes()
    assert parts["c"].read_bytes() + parts["d"].read_bytes() == image.read_bytes()
    tcp_pair.cli("snapshot", "create", "wide", "--name", "s")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 7M 2M", f"{tcp_pair.env['primary']['nbd']}/wide")
    assert run("nbdcopy", f"{tcp_pair.env['standby']['nbd']}/wide@s", "-").stdout == image.read_bytes()


def test_other_clients_read_a_snapshot_and_cannot_write_it(tcp_pair: LocalCluster, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(30).randbytes(5 * MIB) + bytes(SIZE - 5 * MIB))
    run("nbdcopy", "--flush", str(image), volume_uri(tcp_pair))
    tcp_pair.cli("snapshot", "create", "vol", "--name", "s")
    fill(tcp_pair, 31)
    uri = snapshot_uri(tcp_pair, "s")
    export = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"][0]
    assert (export["is_read_only"], export["export-size"]) == (True, SIZE)
    mapped = json.loads(run("nbdinfo", "--map", "--json", uri).stdout)
    assert [(extent["offset"], extent["type"]) for extent in mapped] == [(0, 0), (5 * MIB, 3)]
    assert b"identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri).stdout
    refused = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 4k", uri], capture_output=True, timeout=60, check=False
    )
    assert refused.returncode != 0
    assert read_snapshot(tcp_pair, "s") == image.read_bytes()


def test_without_a_standby_writers_wait_or_fail_or_go_on_as_the_volume_is_told(tcp_pair: LocalCluster) -> None:
    uri = volume_uri(tcp_pair)
    tcp_pair.cli("volume", "set", "vol", "--on-standby-loss", "suspend", "--resync-rate", "20MiB")
    tcp_pair.kill("standby")
    writer = subprocess.Popen(["qemu-io", "-f", "raw", "-c", "write -P 3 0 1M", "-c", "flush", uri])
    deadline = time.monotonic() + 20
    while not tcp_pair.cli("volume", "show", "vol")["withheld_count"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert writer.poll() is None
    status = tcp_pair.run("status")
    assert status.code == 1
    assert "SUSPENDED" in status.stdout
    assert tcp_pair.cli("mirror", "resume", "vol")["suspended"] == []
    assert writer.wait(timeout=20) == 0
    tcp_pair.cli("volume", "set", "vol", "--on-standby-loss", "error")
    failed = subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 4 0 1M", uri], capture_output=True, timeout=60)
    assert b"Input/output error" in failed.stdout + failed.stderr
    # A primary that restarts alone does what it was told before.
    os.kill(pid_of(tcp_pair, "primary"), signal.SIGTERM)
    deadline = time.monotonic() + 20
    while tcp_pair.env["primary"]["pid"] is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tcp_pair.start("primary")
    shown = tcp_pair.cli("volume", "show", "vol")
    assert (shown["on_standby_loss"], shown["resync_rate"], shown["refusing"]) == ("error", 20 * MIB, True)
    tcp_pair.start("standby")
    wait_until(tcp_pair, "in_sync")
    run("qemu-io", "-f", "raw", "-c", "write -P 5 0 1M", uri)
    assert_same_disk(tcp_pair)
