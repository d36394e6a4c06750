"""Reopening goes through the maps piece by piece: what it decides does not depend on where the pieces end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from standby.cow.values import SnapshotState
from tests.support.cow import KIB, Rig, run

BLOCK = 4 * KIB


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("boot", ["the same boot", "another boot"])
def test_snapshots_are_proven_whatever_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, boot: str
) -> None:
    monkeypatch.setattr("standby.cow.recovery.PIECE_BLOCKS", piece)
    monkeypatch.setattr("standby.cow.birth.PIECE_BLOCKS", piece)
    randomness = random.Random(5)

    async def main() -> None:
        boots = ["a boot"]
        rig = Rig(tmp_path, boot=lambda: boots[-1])
        images = {}
        for name in ("s1", "s2"):
            for _ in range(20):
                rig.engine.write(
                    randomness.randrange(rig.size // BLOCK) * BLOCK, memoryview(randomness.randbytes(BLOCK))
                )
            await rig.engine.flush()
            await rig.snapshot(name)
            images[name] = rig.image(name)
        for block in (0, 6, 7, 8, 63, 64, 200, 255):
            rig.engine.write(block * BLOCK, memoryview(b"new!" * (BLOCK // 4)))
        await rig.engine.flush()
        # As if killed: nothing is closed in order.
        if boot == "another boot":
            boots.append(boot)
        rig.reopen()
        assert [snapshot.state for snapshot in rig.engine.snapshots()] == [SnapshotState.ACTIVE] * 2
        for name, image in images.items():
            assert rig.image(name) == image
        await rig.close()

    run(main)
