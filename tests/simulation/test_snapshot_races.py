"""A reader in another process, against an engine that overwrites, snapshots and deletes as fast as it can.

`SNAPSHOT_RACE_S=N` lasts longer.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from standby.cow import open_virtual_device
from standby.cow.association_forms import FORMS
from stillpoint.errors import NotFound, SnapshotInvalid
from tests.support.cow import KIB, MIB, Rig, read, run

_SECONDS = float(os.environ.get("SNAPSHOT_RACE_S", "4"))


def read_until_stopped(folder: Path, seed: int) -> int:
    """In the reader's process: compare random pieces of snapshot "kept" with the image; 0 when all were right."""
    choose = random.Random(seed)
    image = (folder / "image").read_bytes()
    device = open_virtual_device(json.loads((folder / "description").read_text()), "kept")
    reads = 0
    while not (folder / "stop").exists():
        offset = choose.randrange(len(image))
        length = choose.randrange(1, min(len(image) - offset, 300 * KIB) + 1)
        if read(device, offset, length) != image[offset : offset + length]:
            print(f"reader {seed}: {length} bytes at {offset} are wrong")
            return 1
        for extent in device.extents(offset, length):
            if extent.hole and any(image[extent.offset : extent.end]):
                print(f"reader {seed}: {extent} is no hole")
                return 1
        reads += 1
    print(f"reader {seed}: {reads} reads")
    return 0 if reads > 10 else 2


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("block_size", [4 * KIB, 64 * KIB])
def test_a_reader_sees_one_instant_while_everything_changes(tmp_path: Path, kind: str, block_size: int) -> None:
    async def main() -> None:
        choose = random.Random(7)
        rig = Rig(tmp_path, size=8 * MIB, block_size=block_size, store_size=256 * MIB)
        for form in FORMS:
            paths = [tmp_path / form] if kind == "file" else []
            rig.stores.create(form, kind=kind, size=256 * MIB, paths=paths, map_form=form)
        pages = [memoryview(choose.randbytes(4 * KIB)) for _ in range(64)]
        for offset in range(0, rig.size, 8 * KIB):
            rig.engine.write(offset, choose.choice(pages))
        await rig.snapshot("older", "array")
        await rig.snapshot("kept", "hash")
        (tmp_path / "image").write_bytes(rig.engine.read(0, rig.size))
        (tmp_path / "description").write_text(json.dumps(rig.engine.describe()))
        readers = [_reader(tmp_path, seed) for seed in range(2)]
        deadline = time.monotonic() + _SECONDS
        number = 0
        while time.monotonic() < deadline and all(reader.poll() is None for reader in readers):
            number += 1
            for _ in range(30):
                offset = choose.randrange(rig.size // 4096) * 4096
                rig.engine.write(offset, choose.choice(pages))
            if choose.random() < 0.2:
                rig.engine.trim(choose.randrange(rig.size // 2), choose.randrange(256 * KIB))
            await rig.engine.commit()
            await rig.snapshot(f"s{number}", FORMS[number % len(FORMS)])
            if number > 5:
                victims = [snapshot.name for snapshot in rig.engine.snapshots() if snapshot.name != "kept"]
                await rig.engine.delete(choose.choice(victims))
        (tmp_path / "stop").touch()
        outputs = [reader.communicate(timeout=60) for reader in readers]
        print(f"{number} snapshots", outputs)
        assert [reader.returncode for reader in readers] == [0, 0], outputs
        await rig.close()

    run(main)


def test_a_reader_of_a_snapshot_that_is_deleted_gets_its_bytes_or_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        choose = random.Random(11)
        rig = Rig(tmp_path, size=MIB)
        deadline = time.monotonic() + _SECONDS / 2
        number = refused = 0
        while time.monotonic() < deadline:
            number += 1
            rig.engine.write(0, memoryview(choose.randbytes(rig.size)))
            image = rig.engine.read(0, rig.size)
            await rig.snapshot(f"s{number}")
            device = rig.device(f"s{number}")
            rig.engine.write(0, memoryview(choose.randbytes(rig.size)))
            commit_and_delete = [rig.engine.commit(), rig.engine.delete(f"s{number}")]
            for work in commit_and_delete:
                await work
                try:
                    assert read(device, 0, rig.size) == image
                except (SnapshotInvalid, NotFound):
                    refused += 1
            device.close()
        assert refused == number
        await rig.close()

    run(main)


def _reader(folder: Path, seed: int) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path; from tests.simulation.test_snapshot_races import read_until_stopped;"
        f"sys.exit(read_until_stopped(Path({str(folder)!r}), {seed}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
