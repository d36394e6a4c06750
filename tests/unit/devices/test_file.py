"""Files as devices: creation, locks, errors of the system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stillpoint.devices import FileDevice, linux
from stillpoint.errors import (
    AlreadyExists,
    DeviceError,
    InUse,
    InvalidRequest,
    NotFound,
    PermissionRefused,
    StillpointError,
)

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def test_a_created_file_is_sparse_and_has_the_size(path: Path) -> None:
    with_size = FileDevice.create(path, 1 << 40)
    assert with_size.size == path.stat().st_size == 1 << 40
    assert path.stat().st_blocks == 0
    with_size.close()


def test_a_second_writer_is_refused_while_the_first_lives(path: Path) -> None:
    first = FileDevice.create(path, SIZE)
    with pytest.raises(InUse, match="in use by another process"):
        FileDevice(path)
    first.close()
    FileDevice(path).close()


def test_readers_and_sharers_pass_the_lock(path: Path) -> None:
    writer = FileDevice.create(path, SIZE)
    reader = FileDevice(path, read_only=True)
    sharer = FileDevice(path, shared=True)
    writer.write(0, [b"seen by all"])
    for device in (reader, sharer):
        buffer = bytearray(11)
        device.read_into(0, memoryview(buffer))
        assert buffer == b"seen by all"
        device.close()
    writer.close()


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_makes_no_sense_is_refused(path: Path, size: int) -> None:
    with pytest.raises(InvalidRequest):
        FileDevice.create(path, size)
    assert not path.exists()


def test_creating_over_an_existing_file_leaves_it_alone(path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(AlreadyExists):
        FileDevice.create(path, SIZE)
    assert path.read_bytes() == b"precious"


def test_a_file_that_cannot_be_made_leaves_nothing(path: Path) -> None:
    with pytest.raises(DeviceError, match=str(path)):
        FileDevice.create(path, 1 << 62)
    assert not path.exists()


def test_missing_files_folders_and_pipes_are_named_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        FileDevice(tmp_path / "missing")
    with pytest.raises(NotFound):
        FileDevice.create(tmp_path / "no folder" / "disk", SIZE)
    with pytest.raises(InvalidRequest):
        FileDevice(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest):
        FileDevice(tmp_path / "pipe")
    with pytest.raises(InvalidRequest):
        FileDevice("/dev/null")


def test_no_descriptor_is_lost_when_opening_fails(tmp_path: Path) -> None:
    held = FileDevice.create(tmp_path / "held", SIZE)
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "missing", tmp_path / "held", Path("/dev/null")):
        with pytest.raises(StillpointError):
            FileDevice(path)
    assert len(os.listdir("/proc/self/fd")) == before
    held.close()


def test_a_read_beyond_a_file_that_was_cut_is_an_error_not_a_hang(path: Path) -> None:
    device = FileDevice.create(path, SIZE)
    os.truncate(path, 4096)
    with pytest.raises(DeviceError, match="was it cut"):
        device.read_into(0, memoryview(bytearray(8192)))
    device.close()


def test_a_failed_flush_stays_failed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FileDevice.create(path, SIZE)
    calls = iter([OSError(errno.EIO, "Input/output error"), None])

    def fdatasync(_: int) -> None:
        if (error := next(calls)) is not None:
            raise error

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    for _ in range(3):
        with pytest.raises(DeviceError) as raised:
            device.flush()
        assert raised.value.errno == errno.EIO
    device.close()


def test_errors_name_the_path_the_place_and_the_errno(path: Path) -> None:
    device = FileDevice.create(path, SIZE)
    device.close()
    with pytest.raises(DeviceError, match=rf"{path}: write of 3 bytes at 77 failed") as raised:
        device.write(77, [b"abc"])
    assert raised.value.errno == errno.EBADF


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FileDevice.create(path, SIZE)
    real = os.pwrite

    def pwritev(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, b"".join(buffers)[:7], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, buffer, offset: real(descriptor, buffer[:7], offset))
    data = os.urandom(200)
    device.write(5, [data[:3], data[3:50], data[50:100]])
    device.write(105, [data[100:]])
    assert path.read_bytes()[5:205] == data
    device.close()


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FileDevice.create(path, SIZE)
    data = os.urandom(100)
    device.write(5, [data])
    real = os.preadv

    def preadv(descriptor: int, buffers: tuple[memoryview], offset: int, *_: int) -> int:
        return real(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    buffer = bytearray(100)
    device.read_into(5, memoryview(buffer))
    assert buffer == data
    assert not device.try_read_into(5, memoryview(buffer))
    device.close()


@pytest.mark.parametrize("refused", [errno.EOPNOTSUPP, errno.EINVAL])
def test_zeroes_are_written_where_the_file_system_cannot_punch(
    path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    def fallocate(*_: int) -> None:
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(linux, "fallocate", fallocate)
    device = FileDevice.create(path, 3 << 20)
    device.write(0, [b"\xff" * device.size])
    device.trim(1000, 2 << 20)
    device.write_zeroes(3 << 19, 1 << 20)
    contents = path.read_bytes()
    assert contents[:1000] == b"\xff" * 1000
    assert contents[1000 : (3 << 19) + (1 << 20)] == bytes((3 << 19) + (1 << 20) - 1000)
    assert contents[(3 << 19) + (1 << 20) :] == b"\xff" * ((3 << 20) - (3 << 19) - (1 << 20))
    device.close()


@pytest.mark.parametrize("buffers", [[b"x"], [b"x", b"y"]])
def test_a_full_disk_is_an_error_of_its_own_number(
    path: Path, monkeypatch: pytest.MonkeyPatch, buffers: list[bytes]
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    monkeypatch.setattr(os, "pwritev", refuse)
    device = FileDevice.create(path, SIZE)
    with pytest.raises(DeviceError) as raised:
        device.write(0, buffers)
    assert raised.value.errno == errno.ENOSPC
    device.close()


def test_trim_gives_the_space_back_and_zeroing_can_keep_it(path: Path) -> None:
    device = FileDevice.create(path, SIZE)
    device.write(0, [b"\xff" * SIZE])
    device.flush()
    full = path.stat().st_blocks
    device.write_zeroes(0, SIZE, may_trim=False)
    assert path.stat().st_blocks >= full
    device.trim(0, SIZE)
    assert path.stat().st_blocks == 0
    assert [extent.hole for extent in device.extents(0, SIZE)] == [True]
    device.close()


@pytest.mark.parametrize("refused", [errno.EACCES, errno.EROFS])
def test_a_file_that_may_not_be_written_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    path.touch()

    def refuse(*_: object) -> int:
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionRefused):
        FileDevice(path)
