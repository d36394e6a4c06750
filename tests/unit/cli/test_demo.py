"""The demonstration's image and its witness, without nodes."""

import asyncio
import shutil
from pathlib import Path

import pytest

from stillpoint.cli import demo_image
from stillpoint.cli.demo_image import BLOCK_SIZE, Image, record
from stillpoint.cli.demo_story import Narrator, Story
from stillpoint.cli.demo_writer import Writer, find_instant
from stillpoint.cli.local_cluster import LocalCluster
from stillpoint.cli.output import Output
from tests.support.requirements import requires_tools

MIB = 1024 * 1024


class FileVolume:
    """A volume that is a file, and that stops the writer after so many writes."""

    def __init__(self, path: Path, stop: asyncio.Event, count: int) -> None:
        self._file = path.open("r+b", buffering=0)
        self._stop = stop
        self._left = count

    async def write(self, offset: int, data: bytes) -> None:
        self._file.seek(offset)
        self._file.write(data)
        self._left -= 1
        if not self._left:
            self._stop.set()
            self._file.close()


def write_some(path: Path, slots: tuple[int, ...], count: int) -> Writer:
    async def run() -> Writer:
        stop = asyncio.Event()
        writer = Writer(slots, seed=7)
        await writer.run(FileVolume(path, stop, count), stop)
        return writer

    return asyncio.run(run())


@pytest.fixture
def volume(tmp_path: Path) -> tuple[Path, tuple[int, ...]]:
    """A volume of 16 blocks, of which every second is a slot."""
    path = tmp_path / "volume"
    slots = tuple(range(0, 16 * BLOCK_SIZE, 2 * BLOCK_SIZE))
    path.write_bytes(b"".join(record(0, slot) + bytes(BLOCK_SIZE) for slot in range(len(slots))))
    return path, slots


def test_the_instant_is_the_newest_write_the_image_shows(volume: tuple[Path, tuple[int, ...]]) -> None:
    path, slots = volume
    assert find_instant(path, slots) == 0
    writer = write_some(path, slots, 50)
    assert (writer.begun, writer.answered) == (50, 50)
    assert find_instant(path, slots) == 50


def test_applying_the_writes_makes_exactly_the_content_of_the_instant(
    volume: tuple[Path, tuple[int, ...]], tmp_path: Path
) -> None:
    path, slots = volume
    original = tmp_path / "original"
    shutil.copyfile(path, original)
    writer = write_some(path, slots, 50)
    writer.apply(original, 50)
    assert demo_image.first_difference(original, path) is None


def test_a_lost_write_is_a_difference(volume: tuple[Path, tuple[int, ...]], tmp_path: Path) -> None:
    path, slots = volume
    original = tmp_path / "original"
    shutil.copyfile(path, original)
    writer = write_some(path, slots, 50)
    lost_slot = next(slot for slot in range(len(slots)) if slot != writer.history[-1])
    with path.open("r+b") as file:
        file.seek(slots[lost_slot])
        file.write(record(0, lost_slot))
    assert find_instant(path, slots) == 50
    writer.apply(original, 50)
    difference = demo_image.first_difference(original, path)
    assert difference is not None and slots[lost_slot] <= difference < slots[lost_slot] + BLOCK_SIZE


def test_a_shorter_file_differs_where_it_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    assert demo_image.first_difference(tmp_path / "a", tmp_path / "b") == 3


@requires_tools("mke2fs", "e2fsck", "debugfs")
def test_the_image_stays_a_clean_filesystem_whatever_the_writer_did(tmp_path: Path) -> None:
    image = demo_image.make_image(tmp_path / "image", tmp_path / "staging", 64 * MIB)
    assert image.path.stat().st_size == 64 * MIB
    assert image.file_count > 0 and len(image.slots) == 64 * MIB // 8 // BLOCK_SIZE
    assert not (tmp_path / "staging").exists()
    write_some(image.path, image.slots, 500)
    assert demo_image.check_filesystem(image.path) is None
    assert demo_image.read_back(image, image.path, tmp_path / "file")


@requires_tools("mke2fs", "e2fsck", "debugfs")
def test_damage_to_the_filesystem_is_found(tmp_path: Path) -> None:
    image = demo_image.make_image(tmp_path / "image", tmp_path / "staging", 64 * MIB)
    with image.path.open("r+b") as file:
        file.seek(BLOCK_SIZE)
        file.write(b"\xff" * 64 * BLOCK_SIZE)
    assert demo_image.check_filesystem(image.path) is not None


class ToldInstant(Story):
    """A demonstration after its restore: everything but the proof has been done."""

    def __init__(self, work: Path, image: Path, slots: tuple[int, ...], *, answered: int, begun: int) -> None:
        size = image.stat().st_size
        super().__init__(work, size, LocalCluster(work / "cluster"), Narrator(Output(), step_count=8))
        self.image = Image(image, size, 0, 0, "", image, slots)
        self._answered_before, self._begun_after = answered, begun

    def prove(self, writer: Writer) -> list[str]:
        self._check_instant(self.image, writer)
        return self.failures


@pytest.fixture
def restored(volume: tuple[Path, tuple[int, ...]], tmp_path: Path) -> tuple[Path, Writer]:
    """What 50 writes made of the volume, as `restored.img`; and who wrote them."""
    path, slots = volume
    shutil.copyfile(path, tmp_path / "restored.img")
    return tmp_path / "restored.img", write_some(tmp_path / "restored.img", slots, 50)


def test_an_exact_restore_is_proved(volume: tuple[Path, tuple[int, ...]], restored: tuple[Path, Writer]) -> None:
    story = ToldInstant(volume[0].parent, *volume, answered=49, begun=51)
    assert story.prove(restored[1]) == []
    assert story.facts.writes_before_snapshot == 50


def test_one_wrong_bit_anywhere_fails_the_proof(
    volume: tuple[Path, tuple[int, ...]], restored: tuple[Path, Writer]
) -> None:
    outside_of_slots = BLOCK_SIZE + 5
    with restored[0].open("r+b") as file:
        file.seek(outside_of_slots)
        file.write(b"\x01")
    [failure] = ToldInstant(volume[0].parent, *volume, answered=49, begun=51).prove(restored[1])
    assert f"at byte {outside_of_slots}" in failure


@pytest.mark.parametrize(("answered", "begun"), [(51, 52), (10, 49)])
def test_an_instant_before_or_after_the_snapshots_own_fails_the_proof(
    volume: tuple[Path, tuple[int, ...]], restored: tuple[Path, Writer], answered: int, begun: int
) -> None:
    [failure] = ToldInstant(volume[0].parent, *volume, answered=answered, begun=begun).prove(restored[1])
    assert "shows write 50" in failure
