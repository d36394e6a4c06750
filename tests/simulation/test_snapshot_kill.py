"""A process with an engine is killed by SIGKILL at random moments; the next one finds every snapshot it was told of."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from standby.cow import SnapshotEngine, SnapshotState, StoreDirectory, open_virtual_device
from stillpoint.devices import FileDevice
from tests.support.cow import KIB, MIB, read, run

_KILLS = int(os.environ.get("SNAPSHOT_KILLS", "6"))


def _open(folder: Path) -> tuple[SnapshotEngine, FileDevice, StoreDirectory]:
    mirror = FileDevice(folder / "mirror")
    stores = StoreDirectory(folder / "stores", default_size=64 * MIB)
    if (folder / "state").exists():
        engine = SnapshotEngine.open(folder / "state", mirror, stores, mirror_paths=[folder / "mirror"])
    else:
        engine = SnapshotEngine.create(
            folder / "state", "volume", mirror, stores, block_size=4 * KIB, mirror_paths=[folder / "mirror"]
        )
    return engine, mirror, stores


async def live(folder: Path, seed: int) -> None:
    """In the process that is killed: an image is put aside once its snapshot was answered."""
    choose = random.Random(seed)
    engine, _, _ = _open(folder)
    (folder / "ready").touch()
    while True:
        for _ in range(choose.randrange(40)):
            offset = choose.randrange(engine.size - 9000)
            engine.write(offset, memoryview(choose.randbytes(choose.randrange(1, 9000))))
        if choose.random() < 0.5:
            engine.trim(choose.randrange(engine.size // 2), choose.randrange(60_000))
        await engine.flush()
        name = f"s{seed}.{time.monotonic_ns()}"
        image = engine.read(0, engine.size)
        await engine.finish(engine.cut(name))
        (folder / "images" / f"{name}.part").write_bytes(image)
        (folder / "images" / f"{name}.part").rename(folder / "images" / name)
        if len(engine.snapshots()) > 6:
            victim = choose.choice(engine.snapshots()).name
            (folder / "images" / victim).unlink(missing_ok=True)
            await engine.delete(victim)


@pytest.mark.timeout(60 + 5 * _KILLS)
def test_a_killed_engine_leaves_every_snapshot_it_answered(tmp_path: Path) -> None:
    seed = int(os.environ.get("SNAPSHOT_SEED", "1"))
    choose = random.Random(seed)
    FileDevice.create(tmp_path / "mirror", 2 * MIB).close()
    (tmp_path / "images").mkdir()
    checked = 0
    for number in range(_KILLS):
        (tmp_path / "ready").unlink(missing_ok=True)
        process = _start(tmp_path, seed * 1000 + number)
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(choose.uniform(0.05, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checked += run(lambda: _check(tmp_path))
    print(f"{_KILLS} kills, {checked} snapshots compared, seed {seed}")
    assert checked > _KILLS


async def _check(folder: Path) -> int:
    engine, mirror, stores = _open(folder)
    active = {snapshot.name for snapshot in engine.snapshots() if snapshot.state is SnapshotState.ACTIVE}
    images = {path.name: path.read_bytes() for path in (folder / "images").iterdir() if path.suffix != ".part"}
    assert images.keys() <= active
    for name, image in images.items():
        device = open_virtual_device(engine.describe(), name)
        assert read(device, 0, device.size) == image, name
        device.close()
    # As a process that dies: nothing is closed cleanly.
    await engine.close(clean=False)
    stores.close()
    mirror.close()
    return len(images)


def _start(folder: Path, seed: int) -> subprocess.Popen[bytes]:
    code = (
        "import asyncio; from pathlib import Path; from tests.simulation.test_snapshot_kill import live;"
        f"asyncio.run(live(Path({str(folder)!r}), {seed}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
