"""Where an image is written to: a file, a block device or an NBD export.

Invariants:
- Nothing that exists is destroyed without `force`, and nothing that is too small or in use is touched at all.
- What is not finished never looks complete. A file is written as `NAME.partial` and renamed at `finish`. The first MiB
  of a device or export, where partition table and superblock lie, is zeroed first and written last.
- `finish` returns when everything is durable. An error on the way fails the whole: nothing is retried into success.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol, TypeVar

from .config import format_size
from .devices import Buffer, FileDevice
from .document import fsync_folder
from .errors import AlreadyExists, DeviceError, InvalidRequest, Refused
from .extents import Extent, check_range, split
from .target_nbd import NbdDisk

T = TypeVar("T")

PARTIAL_SUFFIX: Final = ".partial"

# Held back until the rest is durable.
_HEAD_SIZE: Final = 1 << 20
# Zeroed by one call, so that a cancelled restore does not wait for a whole disk.
_ZEROES_MAX: Final = 256 << 20
# How a disk is looked at: its first and last MiB, and so many samples between.
_SAMPLE_COUNT: Final = 64
_SAMPLE_SIZE: Final = 64 << 10


class Target(Protocol):
    """Takes the image's bytes. One call at a time. Ranges in ascending order; what is never given is undefined.

    Ends with `finish` or `abort`, once; after an error or a cancelled call only `abort` makes sense.
    """

    @property
    def description(self) -> str:
        """What an operator calls it."""
        ...

    async def write(self, offset: int, data: Buffer) -> None:
        """The buffer must not change any more: the target may still need it. Raises DeviceError, of this or an
        earlier call.
        """
        ...

    async def zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, without writing them where that can be avoided. Raises DeviceError."""
        ...

    async def finish(self) -> None:
        """Complete it: durable on return. Raises DeviceError; it is then incomplete, and does not look complete."""
        ...

    async def abort(self) -> None:
        """Give up: remove the incomplete file, or leave the device without its beginning. Raises nothing."""
        ...


async def open_target(target: str, *, size: int, force: bool = False) -> Target:
    """Open a file, a block device or an `nbd://` URI for an image of `size` bytes.

    force: write over a file that exists, or a device that is not empty.
    Raises AlreadyExists (a file), Refused (too small, not empty), InUse, InvalidRequest, NotFound (no such folder),
    PermissionRefused, PeerUnavailable (NBD) or DeviceError. Nothing was changed then.
    """
    if size <= 0:
        raise InvalidRequest(f"{target}: an image of {size} bytes cannot be written")
    if not target or "\0" in target:
        raise InvalidRequest(f"{target!r} is not the name of a target")
    if target.startswith(("nbd://", "nbds://", "nbd+unix://", "nbds+unix://")):
        return await DiskTarget.open(await NbdDisk.connect(target), size=size, force=force)
    if "://" in target:
        raise InvalidRequest(f"{target}: is neither a path nor an nbd:// URI")
    path = Path(os.path.realpath(target))
    if _is_block_device(path):
        thread = ThreadPoolExecutor(1, thread_name_prefix="target")
        disk = FileDisk(FileDevice(path), thread)
        return await DiskTarget.open(disk, size=size, force=force)
    return await FileTarget.create(path, size=size, force=force)


def _is_block_device(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(path.stat().st_mode)
    return False


class FileTarget:
    """A new sparse file, under its own name only when it is complete. Made by `create`."""

    def __init__(
        self, path: Path, partial: FileDevice, replaced: FileDevice | None, thread: ThreadPoolExecutor
    ) -> None:
        self._path = path
        self._partial = partial
        self._replaced = replaced
        self._thread = thread

    @classmethod
    async def create(cls, path: Path, *, size: int, force: bool) -> FileTarget:
        thread = ThreadPoolExecutor(1, thread_name_prefix="target")
        try:
            return await _in_thread(thread, lambda: cls._create(path, size=size, force=force, thread=thread))
        except OSError as error:
            thread.shutdown(wait=False)
            raise _device_error(f"{path}: cannot be written", error) from error
        except BaseException:
            thread.shutdown(wait=False)
            raise

    @classmethod
    def _create(cls, path: Path, *, size: int, force: bool, thread: ThreadPoolExecutor) -> FileTarget:
        with contextlib.ExitStack() as undo:
            replaced = None
            if path.is_dir():
                raise InvalidRequest(f"{path}: is a folder; name a file in it")
            if path.exists():
                if not force:
                    raise AlreadyExists(f"{path}: exists already; use --force to overwrite it")
                # Held until the end, so that nobody starts to use the file that is about to be replaced.
                replaced = FileDevice(path)
                undo.callback(replaced.close)
            partial_path = path.with_name(path.name + PARTIAL_SUFFIX)
            if partial_path.exists():
                FileDevice(partial_path).close()  # InUse when another restore is writing it
                partial_path.unlink()
            partial = FileDevice.create(partial_path, size)
            undo.pop_all()
        return cls(path, partial, replaced, thread)

    @property
    def description(self) -> str:
        return str(self._path)

    async def write(self, offset: int, data: Buffer) -> None:
        await _in_thread(self._thread, lambda: self._partial.write(offset, [data]))

    async def zeroes(self, offset: int, length: int) -> None:
        # The file is new and sparse: every byte that was not written is zero.
        check_range(offset=offset, length=length, size=self._partial.size)

    async def finish(self) -> None:
        await _in_thread(self._thread, self._finish)
        self._thread.shutdown(wait=False)

    def _finish(self) -> None:
        self._partial.flush()
        try:
            os.fsync(self._partial.fileno())  # the length too
            if self._replaced is not None:
                self._partial.path.replace(self._path)
            else:
                _rename_if_absent(self._partial.path, self._path)
            fsync_folder(self._path.parent)
        except OSError as error:
            raise _device_error(f"{self._path}: completing it failed", error) from error
        self._close()

    async def abort(self) -> None:
        try:
            await asyncio.shield(_in_thread(self._thread, self._abort))
        finally:
            self._thread.shutdown(wait=False)

    def _abort(self) -> None:
        with contextlib.suppress(OSError):
            self._partial.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._partial.close()
        if self._replaced is not None:
            self._replaced.close()


class Disk(Protocol):
    """What DiskTarget needs of a device or export. Ranges lie within `size`; errors are StillpointErrors."""

    @property
    def description(self) -> str: ...

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, length: int) -> Buffer: ...

    async def write(self, offset: int, data: Buffer) -> None: ...

    async def zeroes(self, offset: int, length: int) -> None: ...

    async def flush(self) -> None: ...

    async def close(self) -> None:
        """Raises nothing."""
        ...


class DiskTarget:
    """A device or export that exists already and may be larger than the image; what lies beyond is left alone.

    Whether it is empty is judged by its first and last MiB and 64 samples between them, so one that passes may still
    hold data elsewhere.
    """

    def __init__(self, disk: Disk, size: int) -> None:
        self._disk = disk
        self._head = bytearray(min(size, _HEAD_SIZE))

    @classmethod
    async def open(cls, disk: Disk, *, size: int, force: bool) -> DiskTarget:
        """Takes `disk` over, and closes it when it is refused."""
        try:
            if disk.size < size:
                raise Refused(
                    f"{disk.description}: holds {format_size(disk.size)}, too small for an image of {format_size(size)}"
                    f" ({disk.size} < {size} bytes)"
                )
            if not force:
                await _check_empty(disk)
            target = cls(disk, size)
            await disk.zeroes(0, len(target._head))
            await disk.flush()
        except BaseException:
            await disk.close()
            raise
        return target

    @property
    def description(self) -> str:
        return self._disk.description

    async def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        in_head = max(0, min(len(view), len(self._head) - offset))
        self._head[offset : offset + in_head] = view[:in_head]
        if in_head < len(view):
            await self._disk.write(offset + in_head, view[in_head:])

    async def zeroes(self, offset: int, length: int) -> None:
        in_head = max(0, min(length, len(self._head) - offset))
        self._head[offset : offset + in_head] = bytes(in_head)
        for extent in split(Extent(offset + in_head, length - in_head), limit=_ZEROES_MAX):
            await self._disk.zeroes(extent.offset, extent.length)

    async def finish(self) -> None:
        await self._disk.flush()
        if any(self._head):
            await self._disk.write(0, self._head)
            await self._disk.flush()
        await self._disk.close()

    async def abort(self) -> None:
        await self._disk.close()


class FileDisk:
    """A block device as a Disk; `thread` makes all its calls, one after the other, so that closing comes last."""

    def __init__(self, device: FileDevice, thread: ThreadPoolExecutor) -> None:
        self._device = device
        self._thread = thread

    @property
    def description(self) -> str:
        return self._device.description

    @property
    def size(self) -> int:
        return self._device.size

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = bytearray(length)
        await _in_thread(self._thread, lambda: self._device.read_into(offset, memoryview(buffer)))
        return buffer

    async def write(self, offset: int, data: Buffer) -> None:
        await _in_thread(self._thread, lambda: self._device.write(offset, [data]))

    async def zeroes(self, offset: int, length: int) -> None:
        await _in_thread(self._thread, lambda: self._device.write_zeroes(offset, length))

    async def flush(self) -> None:
        await _in_thread(self._thread, self._device.flush)

    async def close(self) -> None:
        try:
            await asyncio.shield(_in_thread(self._thread, self._device.close))
        finally:
            self._thread.shutdown(wait=False)


async def _check_empty(disk: Disk) -> None:
    for extent in _samples(disk.size):
        if any(memoryview(await disk.read(extent.offset, extent.length))):
            raise Refused(f"{disk.description}: is not empty; use --force to overwrite it")


def _samples(size: int) -> Iterator[Extent]:
    if size <= 2 * _HEAD_SIZE + _SAMPLE_COUNT * _SAMPLE_SIZE:
        yield from split(Extent(0, size), limit=_HEAD_SIZE)
        return
    yield Extent(0, _HEAD_SIZE)
    yield Extent(size - _HEAD_SIZE, _HEAD_SIZE)
    for index in range(1, _SAMPLE_COUNT + 1):
        yield Extent(size * index // (_SAMPLE_COUNT + 1) // _SAMPLE_SIZE * _SAMPLE_SIZE, _SAMPLE_SIZE)


def _rename_if_absent(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        raise AlreadyExists(f"{target}: was made by somebody else meanwhile; use --force to overwrite it") from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        # A file system without hard links.
        if target.exists():
            raise AlreadyExists(f"{target}: was made by somebody else meanwhile") from None
        source.rename(target)
        return
    source.unlink()


async def _in_thread(thread: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, call)


def _device_error(what: str, error: OSError) -> DeviceError:
    return DeviceError(f"{what}: {error.strerror or error}", error.errno or errno.EIO)
