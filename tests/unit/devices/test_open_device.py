"""Opening one or several paths as one device of a given size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillpoint.devices import FileDevice, MemoryDevice, open_device
from stillpoint.errors import InUse, InvalidRequest, NotFound

MIB = 1 << 20


def test_one_path_is_opened_whole(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 12345)
    device = open_device([tmp_path / "disk"])
    assert device.size == 12345
    device.close()


def test_missing_files_are_made_only_when_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_device([tmp_path / "disk"], size=MIB)
    device = open_device([tmp_path / "disk"], size=MIB, create=True)
    assert device.size == MIB
    device.close()


def test_missing_files_share_what_existing_ones_lack(tmp_path: Path) -> None:
    FileDevice.create(tmp_path / "b", 2 * MIB).close()
    paths = [tmp_path / name for name in "abc"]
    device = open_device(paths, size=7 * MIB + 512, create=True)
    assert [path.stat().st_size for path in paths] == [3 * MIB, 2 * MIB, 2 * MIB + 512]
    assert device.size == 7 * MIB + 512
    device.close()


def test_bytes_beyond_the_size_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * MIB)
    device = open_device([tmp_path / "disk"], size=4096)
    assert device.size == 4096
    device.trim(0, 4096)
    assert (tmp_path / "disk").read_bytes() == bytes(4096) + b"x" * (MIB - 4096)
    device.close()


def test_too_small_is_one_clear_line_and_nothing_stays_locked(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 4096)
    with pytest.raises(InvalidRequest, match="holds 4096 bytes, too small for 8192"):
        open_device([tmp_path / "disk"], size=8192)
    open_device([tmp_path / "disk"]).close()


def test_a_failure_removes_the_files_it_made(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_device([tmp_path / "a", tmp_path / "missing" / "b"], size=2 * MIB, create=True)
    assert list(tmp_path.iterdir()) == []


def test_a_held_file_is_refused_and_no_other_is_made(tmp_path: Path) -> None:
    held = FileDevice.create(tmp_path / "held", MIB)
    with pytest.raises(InUse):
        open_device([tmp_path / "new", tmp_path / "held"], size=2 * MIB, create=True)
    assert not (tmp_path / "new").exists()
    held.close()


@pytest.mark.parametrize("size", [0, -5])
def test_a_size_of_nothing_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidRequest):
        open_device([tmp_path / "disk"], size=size, create=True)
    assert not (tmp_path / "disk").exists()


def test_a_path_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="named twice"):
        open_device([tmp_path / "a", tmp_path / "a"], size=MIB, create=True)


def test_memory_is_seen_through_its_descriptor() -> None:
    device = MemoryDevice(MIB)
    other = MemoryDevice.from_descriptor(os.dup(device.fileno()), read_only=True)
    device.write(4096, [b"shared"])
    buffer = bytearray(6)
    assert other.try_read_into(4096, memoryview(buffer))
    assert buffer == b"shared"
    assert other.size == MIB
    device.close()
    other.close()
