"""Where images are written to: files, real block devices, a real NBD server."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from stillpoint.devices import Buffer, FileDevice, MemoryDevice
from stillpoint.errors import (
    AlreadyExists,
    DataCorrupt,
    DeviceError,
    InUse,
    InvalidRequest,
    NotFound,
    PeerUnavailable,
    PermissionRefused,
    Refused,
    StillpointError,
)
from stillpoint.nbd.export import DeviceExport
from stillpoint.nbd.listen import listen_tcp, uri
from stillpoint.nbd.server import NbdServer
from stillpoint.target import Target, open_target
from tests.support.devices import Fault, FaultyDevice
from tests.support.requirements import requires_loop_devices, requires_root

SIZE = (5 << 20) + 512
IMAGE = random.Random(1).randbytes(3 << 20) + bytes(1 << 20) + random.Random(2).randbytes((1 << 20) + 512)


async def write_image(target: str, *, force: bool = False, finish: bool = True, image: bytes = IMAGE) -> None:
    opened = await open_target(target, size=len(image), force=force)
    step = 700_000
    for offset in range(0, len(image), step):
        piece = image[offset : offset + step]
        if any(piece):
            await opened.write(offset, piece)
        else:
            await opened.zeroes(offset, len(piece))
    if finish:
        await opened.finish()
    else:
        await opened.abort()


def test_a_file_holds_the_image_and_nothing_else_is_left(tmp_path: Path) -> None:
    asyncio.run(write_image(str(tmp_path / "out.img")))
    assert (tmp_path / "out.img").read_bytes() == IMAGE
    assert os.listdir(tmp_path) == ["out.img"]


def test_a_hole_takes_no_space_in_a_file(tmp_path: Path) -> None:
    async def main() -> None:
        target = await open_target(str(tmp_path / "out.img"), size=1 << 40)
        await target.zeroes(0, 1 << 39)
        await target.write(1 << 39, b"data")
        await target.zeroes((1 << 39) + 4, (1 << 39) - 4)
        await target.finish()

    asyncio.run(main())
    assert (tmp_path / "out.img").stat().st_size == 1 << 40
    assert (tmp_path / "out.img").stat().st_blocks < 100


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    async def main() -> None:
        target = await open_target(str(tmp_path / "out.img"), size=SIZE)
        await target.write(0, IMAGE)
        assert os.listdir(tmp_path) == ["out.img.partial"]
        await target.abort()
        assert os.listdir(tmp_path) == []

    asyncio.run(main())


def test_a_file_that_exists_is_kept_unless_forced_and_until_it_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    path.write_bytes(b"precious")
    with pytest.raises(AlreadyExists, match=r"out\.img: exists already; use --force"):
        asyncio.run(write_image(str(path)))
    asyncio.run(write_image(str(path), force=True, finish=False))
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out.img"]
    asyncio.run(write_image(str(path), force=True))
    assert path.read_bytes() == IMAGE
    assert os.listdir(tmp_path) == ["out.img"]


def test_a_file_made_by_somebody_else_meanwhile_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        target = await open_target(str(tmp_path / "out.img"), size=SIZE)
        (tmp_path / "out.img").write_bytes(b"precious")
        with pytest.raises(AlreadyExists, match="somebody else"):
            await target.finish()
        await target.abort()

    asyncio.run(main())
    assert (tmp_path / "out.img").read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out.img"]


def test_what_a_crashed_restore_left_is_replaced_and_a_running_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "out.img.partial").write_bytes(b"old")

    async def main() -> None:
        first = await open_target(str(tmp_path / "out.img"), size=SIZE)
        with pytest.raises(InUse):
            await open_target(str(tmp_path / "out.img"), size=SIZE)
        await first.write(0, IMAGE)
        await first.finish()

    asyncio.run(main())
    assert (tmp_path / "out.img").read_bytes() == IMAGE


def test_a_file_in_use_is_not_replaced_even_when_forced(tmp_path: Path) -> None:
    held = FileDevice.create(tmp_path / "disk", SIZE)
    with pytest.raises(InUse):
        asyncio.run(write_image(str(tmp_path / "disk"), force=True))
    held.close()
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("", InvalidRequest),
        ("a\0b", InvalidRequest),
        ("{tmp}", InvalidRequest),
        ("{tmp}/missing/out.img", NotFound),
        ("{tmp}/" + "x" * 300, DeviceError),
        ("http://example.org/x", InvalidRequest),
        ("nbd://127.0.0.1:1/vol", PeerUnavailable),
    ],
)
def test_a_target_that_cannot_be_is_a_named_error(tmp_path: Path, target: str, error: type[StillpointError]) -> None:
    with pytest.raises(error):
        asyncio.run(write_image(target.replace("{tmp}", str(tmp_path))))
    assert os.listdir(tmp_path) == []


@requires_root
def test_a_full_disk_fails_the_restore_and_leaves_nothing(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], check=True)
    try:

        async def main() -> None:
            target = await open_target(str(tmp_path / "out.img"), size=SIZE)
            with pytest.raises(DeviceError, match=r"out\.img\.partial: write of"):
                await target.write(0, IMAGE)
            await target.abort()

        asyncio.run(main())
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@contextmanager
def loop_device(folder: Path, size: int) -> Iterator[Path]:
    image = folder / "loop.img"
    with image.open("wb") as file:
        file.truncate(size)
    command = ["losetup", "--find", "--show", str(image)]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(path)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


@requires_loop_devices
def test_a_block_device_holds_the_image_and_keeps_what_lies_beyond(tmp_path: Path) -> None:
    with loop_device(tmp_path, 8 << 20) as path:
        path.write_bytes(b"\xee" * (8 << 20))
        with pytest.raises(Refused, match="is not empty; use --force"):
            asyncio.run(write_image(str(path)))
        assert path.read_bytes() == b"\xee" * (8 << 20)
        asyncio.run(write_image(str(path), force=True))
        assert path.read_bytes() == IMAGE + b"\xee" * ((8 << 20) - SIZE)


@requires_loop_devices
def test_a_block_device_is_refused_when_it_is_too_small_or_in_use(tmp_path: Path) -> None:
    with loop_device(tmp_path, 4 << 20) as path:
        with pytest.raises(Refused, match=r"too small for an image of 5\.0 MiB"):
            asyncio.run(write_image(str(path), force=True))
    with loop_device(tmp_path, 8 << 20) as path:
        holder = os.open(path, os.O_RDWR | os.O_EXCL)
        with pytest.raises(InUse):
            asyncio.run(write_image(str(path), force=True))
        os.close(holder)
        asyncio.run(write_image(str(path)))


@requires_loop_devices
def test_data_in_the_middle_of_a_large_device_is_noticed_where_it_is_sampled(tmp_path: Path) -> None:
    with loop_device(tmp_path, 64 << 20) as path:
        with path.open("r+b") as device:
            device.seek(30 << 20)
            device.write(b"\xff" * (2 << 20))
        with pytest.raises(Refused, match="is not empty"):
            asyncio.run(write_image(str(path)))


@requires_loop_devices
def test_an_incomplete_restore_onto_a_device_has_no_beginning(tmp_path: Path) -> None:
    with loop_device(tmp_path, 8 << 20) as path:
        asyncio.run(write_image(str(path), finish=False))
        contents = path.read_bytes()
        assert contents[: 1 << 20] == bytes(1 << 20)
        assert contents[1 << 20 : SIZE] == IMAGE[1 << 20 :]


@asynccontextmanager
async def nbd_server(device: MemoryDevice | FaultyDevice, *, read_only: bool = False) -> AsyncIterator[str]:
    with ThreadPoolExecutor(2) as executor:
        server = NbdServer({"vol": DeviceExport("vol", device, executor, read_only=read_only)}, executor)
        listener = listen_tcp("127.0.0.1", 0)
        name = uri(listener, "vol")
        server.listen([listener])
        try:
            yield name
        finally:
            await server.stop()


def contents_of(device: MemoryDevice) -> bytes:
    buffer = bytearray(device.size)
    device.read_into(0, memoryview(buffer))
    return bytes(buffer)


def test_an_nbd_export_holds_the_image_and_keeps_what_lies_beyond() -> None:
    async def main() -> None:
        device = MemoryDevice(8 << 20)
        device.write(0, [b"\xee" * device.size])
        async with nbd_server(device) as name:
            with pytest.raises(Refused, match=r"nbd://.* is not empty; use --force"):
                await write_image(name)
            await write_image(name, force=True)
        assert contents_of(device) == IMAGE + b"\xee" * (device.size - SIZE)

    asyncio.run(main())


def test_an_nbd_export_is_refused_when_it_is_too_small_or_read_only() -> None:
    async def main() -> None:
        async with nbd_server(MemoryDevice(4 << 20)) as name:
            with pytest.raises(Refused, match="too small"):
                await write_image(name, force=True)
        async with nbd_server(MemoryDevice(8 << 20), read_only=True) as name:
            with pytest.raises(PermissionRefused, match="read-only"):
                await write_image(name, force=True)

    asyncio.run(main())


async def write_the_rest(target: Target) -> None:
    for offset in range(1 << 20, 5 << 20, 1 << 20):
        await target.write(offset, IMAGE[offset : offset + (1 << 20)])
    await target.finish()


def test_an_error_that_the_server_tells_late_fails_the_restore() -> None:
    async def main() -> None:
        faulty = FaultyDevice(MemoryDevice(8 << 20))
        async with nbd_server(faulty) as name:
            target = await open_target(name, size=SIZE)
            faulty.writes = Fault(errno.EIO, first=faulty.write_count + 2)
            with pytest.raises(DeviceError, match="Input/output error"):
                await write_the_rest(target)
            await target.abort()

    asyncio.run(main())


def test_a_server_that_goes_away_fails_the_restore() -> None:
    async def main() -> None:
        async with nbd_server(MemoryDevice(8 << 20)) as name:
            target = await open_target(name, size=SIZE)
        with pytest.raises(PeerUnavailable):
            await write_the_rest(target)
        await target.abort()

    asyncio.run(main())


def test_a_file_system_without_links_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    asyncio.run(write_image(str(tmp_path / "out.img")))
    assert (tmp_path / "out.img").read_bytes() == IMAGE
    assert os.listdir(tmp_path) == ["out.img"]


CHANGED = IMAGE[: 2 << 20] + bytes(100_000) + IMAGE[(2 << 20) + 100_000 : SIZE - 70_000] + b"x" * 70_000


async def write_differences(target: str, image: bytes, *, verify: bool = False, finish: bool = True) -> int:
    opened = await open_target(target, size=len(image), differences=True, verify=verify)
    for offset in range(0, len(image), 700_000):
        piece = image[offset : offset + 700_000]
        await (opened.write(offset, piece) if any(piece) else opened.zeroes(offset, len(piece)))
    await (opened.finish() if finish else opened.abort())
    return opened.written_bytes


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("older", [IMAGE, IMAGE + b"longer" * 1000, IMAGE[: 1 << 20], b"", None])
def test_over_an_older_state_only_what_differs_is_written(tmp_path: Path, older: bytes | None, verify: bool) -> None:
    path = tmp_path / "out.img"
    if older is not None:
        path.write_bytes(older)
    written = asyncio.run(write_differences(str(path), CHANGED, verify=verify))
    assert path.read_bytes() == CHANGED
    assert os.listdir(tmp_path) == ["out.img"]
    if older and older.startswith(IMAGE):
        assert written < 4 * 64 * 1024 + 100_000 + 70_000


def test_over_an_older_state_a_failed_restore_never_looks_complete_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    path.write_bytes(IMAGE)

    async def begin() -> None:
        target = await open_target(str(path), size=SIZE, differences=True)
        assert os.listdir(tmp_path) == ["out.img.partial"]
        await target.write(0, b"y" * (1 << 20))
        await target.abort()

    asyncio.run(begin())
    assert os.listdir(tmp_path) == ["out.img.partial"]
    written = asyncio.run(write_differences(str(path), IMAGE))
    assert os.listdir(tmp_path) == ["out.img"] and path.read_bytes() == IMAGE
    assert 1 << 20 <= written <= (1 << 20) + (64 << 10)


def test_over_an_older_state_in_use_nothing_is_touched(tmp_path: Path) -> None:
    held = FileDevice.create(tmp_path / "disk", SIZE)
    with pytest.raises(InUse):
        asyncio.run(write_differences(str(tmp_path / "disk"), IMAGE))
    held.close()
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.parametrize("verify", [False, True])
def test_over_an_older_state_of_an_nbd_export_only_what_differs_is_written(verify: bool) -> None:
    async def main() -> None:
        device = MemoryDevice(8 << 20)
        device.write(0, [IMAGE + b"\xee" * (device.size - SIZE)])
        async with nbd_server(device) as name:
            written = await write_differences(name, CHANGED, verify=verify)
        assert contents_of(device) == CHANGED + b"\xee" * (device.size - SIZE)
        assert written < (1 << 20) + 4 * 64 * 1024 + 170_000  # the first MiB is always written

    asyncio.run(main())


@pytest.mark.parametrize("place", [10, (2 << 20) + 5, (3 << 20) + 100])
def test_a_byte_that_does_not_read_back_as_it_was_written_fails_the_restore(place: int) -> None:
    """In what was held back, in data, and where zeroes are due."""

    class Forgetful(MemoryDevice):
        def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
            super().write(offset, buffers)
            super().write(place, [b"?"])

        def write_zeroes(self, offset: int, length: int, *, may_trim: bool = True) -> None:
            super().write_zeroes(offset, length, may_trim=may_trim)
            super().write(place, [b"?"])

    async def main() -> None:
        device = Forgetful(8 << 20)
        async with nbd_server(device) as name:
            target = await open_target(name, size=SIZE, force=True, verify=True)
            await target.write(0, IMAGE[: 3 << 20])
            await target.zeroes(3 << 20, 1 << 20)
            await target.write(4 << 20, IMAGE[4 << 20 :])
            with pytest.raises(DataCorrupt, match="read back"):
                await target.finish()
            await target.abort()

    asyncio.run(main())
