"""The file system under the store is full: a small tmpfs, as an administrator meets it."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from standby.cow import SnapshotState
from stillpoint.errors import SnapshotInvalid, StillpointError
from tests.support.cow import MIB, Rig, run
from tests.support.requirements import requires_root, requires_tools

pytestmark = [requires_root, requires_tools("mount")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("everything", [False, True], ids=["store only", "state folder too"])
def test_a_full_disk_costs_snapshots_and_room_brings_new_ones(
    tmp_path: Path, small_disk: Path, everything: bool
) -> None:
    async def main() -> None:
        choose = random.Random(6)
        rig = Rig(tmp_path, size=16 * MIB)
        await rig.engine.destroy()
        rig.stores.create("small", kind="file", size=64 * MIB, paths=[small_disk / "store"])
        if everything:
            (tmp_path / "state").symlink_to(small_disk / "state")
        state = small_disk / "state" if everything else tmp_path / "state"
        engine_type = type(rig.engine)
        rig.engine = engine_type.create(
            state, "volume", rig.mirror, rig.stores, block_size=rig.block_size, mirror_paths=[rig.mirror_path]
        )
        images: dict[str, bytes] = {}
        last = b""
        for number in range(6):
            data = choose.randbytes(rig.size // 4)
            offset = choose.randrange(rig.size - len(data))
            rig.engine.write(offset, memoryview(data))
            await rig.engine.flush()
            last = rig.engine.read(0, rig.size)
            try:
                await rig.snapshot(f"s{number}", "small")
            except StillpointError:
                assert everything or rig.stores.get_open("small").failed  # type: ignore[union-attr]
            else:
                images[f"s{number}"] = last
        rig.engine.write(0, memoryview(choose.randbytes(rig.size)))
        await rig.engine.flush()
        last = rig.engine.read(0, rig.size)
        assert rig.mirror_path.read_bytes() == last
        _exact_or_invalid(rig, images)
        assert any(snapshot.state is SnapshotState.INVALID for snapshot in rig.engine.snapshots())
        await rig.engine.close()
        rig.reopen()
        assert rig.engine.read(0, rig.size) == last
        _exact_or_invalid(rig, images)
        _grow(small_disk)
        await rig.snapshot("roomy", "small")
        rig.engine.write(0, memoryview(choose.randbytes(rig.size)))
        await rig.engine.flush()
        assert rig.image("roomy") == last
        await rig.close()

    run(main)


def _grow(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def _exact_or_invalid(rig: Rig, images: dict[str, bytes]) -> None:
    for snapshot in rig.engine.snapshots():
        if snapshot.state is SnapshotState.ACTIVE:
            assert rig.image(snapshot.name) == images[snapshot.name]
        else:
            with pytest.raises(SnapshotInvalid):
                rig.device(snapshot.name)
