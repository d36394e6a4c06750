"""The dirty map against a model that remembers every write and every flush."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from primary.dirty_map import CHUNK_SIZE, DirtyMap
from stillpoint.errors import DataCorrupt
from stillpoint.extents import Extent

SIZE = 40 * CHUNK_SIZE + 512


def dirty_chunks(dirty: DirtyMap) -> set[int]:
    found: set[int] = set()
    offset = 0
    while (run := dirty.next_dirty(offset, limit=1 << 30)) is not None:
        found |= set(range(run.offset // CHUNK_SIZE, -(-run.end // CHUNK_SIZE)))
        offset = run.end
    return found


def chunks_of(offset: int, length: int) -> set[int]:
    return set(range(offset // CHUNK_SIZE, (offset + length - 1) // CHUNK_SIZE + 1))


@pytest.mark.parametrize("seed", range(60))
def test_what_is_not_known_durable_there_is_never_forgotten(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    dirty = DirtyMap(tmp_path / "dirty.map", SIZE, create=True)
    lacking: set[int] = set()  # chunks written since the mirror last held them durably
    flushing: set[int] | None = None
    connected = False
    for _ in range(400):
        action = generator.random()
        if action < 0.6:
            offset = generator.randrange(SIZE)
            length = min(generator.choice([1, 512, 4096, CHUNK_SIZE, 5 * CHUNK_SIZE]), SIZE - offset)
            dirty.mark(offset, length)
            touched = chunks_of(offset, length)
            lacking |= touched
            if flushing is not None:
                flushing -= touched
        elif action < 0.7 and not connected:
            dirty.connect()
            connected = True
        elif action < 0.75 and connected:
            dirty.disconnect()
            connected, flushing = False, None
            assert lacking <= dirty_chunks(dirty)
        elif action < 0.85 and connected and flushing is None:
            dirty.begin_flush()
            flushing = lacking - dirty_chunks(dirty)
        elif action < 0.95 and flushing is not None:
            dirty.flushed()
            lacking -= flushing
            flushing = None
        elif connected and (run := dirty.next_dirty(0, limit=3 * CHUNK_SIZE)) is not None:
            dirty.sent(run)
        assert dirty.dirty_count == len(dirty_chunks(dirty))
    dirty.close(clean=True)
    again = DirtyMap(tmp_path / "dirty.map", SIZE, create=False)
    assert dirty_chunks(again) == lacking  # and, over a clean stop, nothing more than that
    again.close(clean=True)


def test_the_map_survives_a_kill_of_the_process(tmp_path: Path) -> None:
    dirty = DirtyMap(tmp_path / "dirty.map", SIZE, create=True)
    dirty.connect()
    dirty.mark(3 * CHUNK_SIZE, 10)
    # A killed process closes nothing; what it had mapped is in the page cache, which a copy reads.
    shutil.copy(tmp_path / "dirty.map", tmp_path / "after.map")
    again = DirtyMap(tmp_path / "after.map", SIZE, create=False)
    assert dirty_chunks(again) == {3}
    again.close(clean=True)
    dirty.close(clean=True)


def test_after_a_power_loss_everything_is_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dirty = DirtyMap(tmp_path / "dirty.map", SIZE, create=True)
    shutil.copy(tmp_path / "dirty.map", tmp_path / "after.map")
    dirty.close(clean=True)
    monkeypatch.setattr("primary.dirty_map.boot_id", lambda: "00000000-0000-0000-0000-000000000000")
    lost = DirtyMap(tmp_path / "after.map", SIZE, create=False)
    assert dirty_chunks(lost) == set(range(41))
    lost.close(clean=False)
    clean = DirtyMap(tmp_path / "dirty.map", SIZE, create=False)
    assert dirty_chunks(clean) == set()
    clean.close(clean=True)


def test_a_map_with_a_damaged_header_counts_everything_as_dirty(tmp_path: Path) -> None:
    DirtyMap(tmp_path / "dirty.map", SIZE, create=True).close(clean=True)
    data = bytearray((tmp_path / "dirty.map").read_bytes())
    data[12] ^= 1
    (tmp_path / "dirty.map").write_bytes(data)
    again = DirtyMap(tmp_path / "dirty.map", SIZE, create=False)
    assert again.dirty_count == 41
    again.close(clean=True)


def test_a_map_of_another_size_is_refused(tmp_path: Path) -> None:
    DirtyMap(tmp_path / "dirty.map", SIZE, create=True).close(clean=True)
    with pytest.raises(DataCorrupt):
        DirtyMap(tmp_path / "dirty.map", SIZE + CHUNK_SIZE, create=False)


def test_the_last_run_ends_with_the_volume(tmp_path: Path) -> None:
    dirty = DirtyMap(tmp_path / "dirty.map", SIZE, create=True)
    dirty.mark(SIZE - 1, 1)
    assert dirty.next_dirty(0, limit=1 << 30) == Extent(40 * CHUNK_SIZE, 512)
    dirty.close(clean=True)


def test_a_grown_map_keeps_what_was_dirty_and_adds_clean_chunks(tmp_path: Path) -> None:
    dirty = DirtyMap(tmp_path / "dirty.map", SIZE, create=True)
    dirty.mark(3 * CHUNK_SIZE, 1)
    dirty.connect()
    dirty.mark(5 * CHUNK_SIZE, 1)
    dirty.grow(100 * CHUNK_SIZE)
    assert dirty_chunks(dirty) == {3}
    dirty.mark(99 * CHUNK_SIZE, CHUNK_SIZE)
    dirty.disconnect()
    assert dirty_chunks(dirty) == {3, 5, 99}
    dirty.close(clean=True)
    again = DirtyMap(tmp_path / "dirty.map", 100 * CHUNK_SIZE, create=False)
    assert dirty_chunks(again) == {3, 5, 99}
    again.close(clean=True)


def test_a_map_that_grew_before_its_volume_could_serves_the_old_size(tmp_path: Path) -> None:
    dirty = DirtyMap(tmp_path / "dirty.map", SIZE, create=True)
    dirty.mark(3 * CHUNK_SIZE, 1)
    dirty.grow(100 * CHUNK_SIZE)
    dirty.close(clean=True)
    again = DirtyMap(tmp_path / "dirty.map", SIZE, create=False)
    assert dirty_chunks(again) == {3}
    again.grow(60 * CHUNK_SIZE)
    assert dirty_chunks(again) == {3}
    again.close(clean=True)
    DirtyMap(tmp_path / "dirty.map", 60 * CHUNK_SIZE, create=False).close(clean=True)


def test_growth_within_the_last_chunk_needs_no_more_of_the_map(tmp_path: Path) -> None:
    dirty = DirtyMap(tmp_path / "dirty.map", SIZE, create=True)
    dirty.grow(SIZE + 512)
    dirty.mark(SIZE, 512)
    run = dirty.next_dirty(0, limit=1 << 30)
    assert run is not None and run.end == SIZE + 512
    dirty.close(clean=True)
