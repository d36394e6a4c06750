"""What changed since an instant: what the export process computes window by window, beside the engine's own answer."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from standby import changes
from standby.changes import Changes, Instant, instants
from tests.support.cow import KIB, MIB, Rig, run


@pytest.mark.parametrize("window", [1, 7, 1 << 18])
def test_windows_of_any_size_give_the_engines_answer(
    tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_WINDOW_BLOCKS", window)

    async def main() -> None:
        choose = random.Random(3)
        rig = Rig(tmp_path)
        for number in range(6):
            for _ in range(12):
                offset = choose.randrange(MIB - 20_000)
                rig.engine.write(offset, memoryview(choose.randbytes(choose.choice((1, 5000, 20_000)))))
            await rig.snapshot(f"s{number}")
        incarnation = rig.engine.incarnation
        for newer in range(1, 6):
            device = rig.device(f"s{newer}")
            for older in range(newer + 1):
                generation = rig.engine.get(f"s{older}").generation
                theirs = await rig.engine.changed(f"s{newer}", base=generation, incarnation=incarnation)
                ours = Changes(
                    device,
                    Instant(str(incarnation), generation),
                    incarnation=str(incarnation),
                    block_size=rig.block_size,
                )
                assert ours.known
                parts = list(ours.parts(0, MIB))
                assert sum(length for length, _ in parts) == MIB
                assert all(one[1] != next_[1] for one, next_ in pairwise(parts))
                at, dirty = 0, []
                for length, changed in parts:
                    dirty += [(at, length)] if changed else []
                    at += length
                assert dirty == [(each.offset, each.length) for each in theirs.extents]
                # A range that ends inside blocks is told to the byte.
                start, end = sorted(choose.sample(range(MIB), 2))
                assert sum(length for length, _ in ours.parts(start, end - start)) == end - start
            device.close()
        await rig.close()

    run(main)


def test_an_instant_of_another_life_is_unknown_and_everything_counts_as_changed(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.snapshot("s")
        device = rig.device("s")
        here = str(rig.engine.incarnation)
        for base in (None, Instant("another", 1), Instant(here, device.generation + 1)):
            answer = Changes(device, base, incarnation=here, block_size=4 * KIB)
            assert not answer.known
            assert list(answer.parts(0, MIB)) == [(MIB, True)]
        device.close()
        await rig.close()

    run(main)


def test_a_name_that_is_both_bookmark_and_snapshot_means_the_older_instant() -> None:
    def named(bookmark: int, snapshot: int, incarnation: str = "now") -> Instant:
        return instants(
            {
                "uuid": "now",
                "bookmarks": [{"name": "n", "generation": bookmark, "incarnation": incarnation}],
                "snapshots": [{"name": "n", "generation": snapshot, "state": "active"}],
            }
        )["n"]

    assert named(1, 5) == Instant("now", 1)
    assert named(5, 1) == Instant("now", 1)
    # A bookmark of another life says nothing about this one, whatever its number.
    assert named(9, 1, "before") == Instant("before", 9)
