"""An image as a file, under its own name only when it is complete."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from ..devices import Buffer, FileDevice
from ..document import fsync_folder
from ..errors import AlreadyExists, InvalidRequest
from ..extents import check_range
from .threads import device_error, in_thread

PARTIAL_SUFFIX: Final = ".partial"


class FileTarget:
    """A sparse file, under its own name only when it is complete. Made by `create`, or of an older state by `reuse`."""

    def __init__(
        self,
        path: Path,
        partial: FileDevice,
        replaced: FileDevice | None,
        thread: ThreadPoolExecutor,
        *,
        reused: bool = False,
    ) -> None:
        self._path = path
        self._partial = partial
        self._replaced = replaced
        self._thread = thread
        self._reused = reused
        self.written_bytes = 0

    @classmethod
    async def create(cls, path: Path, *, size: int, force: bool) -> FileTarget:
        """A new one."""
        return await cls._made(path, lambda thread: cls._create(path, size=size, force=force, thread=thread))

    @classmethod
    async def reuse(cls, path: Path, *, size: int) -> FileTarget:
        """What is there, or what an earlier attempt left, cut or grown to `size`; a new one when there is neither."""
        return await cls._made(path, lambda thread: cls._reuse(path, size=size, thread=thread))

    @staticmethod
    async def _made(path: Path, make: Callable[[ThreadPoolExecutor], FileTarget]) -> FileTarget:
        thread = ThreadPoolExecutor(1, thread_name_prefix="target")
        try:
            return await in_thread(thread, lambda: make(thread))
        except OSError as error:
            thread.shutdown(wait=False)
            raise device_error(f"{path}: cannot be written", error) from error
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

    @classmethod
    def _reuse(cls, path: Path, *, size: int, thread: ThreadPoolExecutor) -> FileTarget:
        partial_path = path.with_name(path.name + PARTIAL_SUFFIX)
        if path.is_dir():
            raise InvalidRequest(f"{path}: is a folder; name a file in it")
        if not path.exists() and not partial_path.exists():
            return cls._create(path, size=size, force=False, thread=thread)
        found = path if path.exists() else partial_path
        FileDevice(found).close()  # InUse, with nothing changed
        if found is path:
            # First, so that it is not taken for complete from now on.
            path.replace(partial_path)
            fsync_folder(path.parent)
        os.truncate(partial_path, size)
        return cls(path, FileDevice(partial_path), None, thread, reused=True)

    @property
    def description(self) -> str:
        return str(self._path)

    @property
    def starts_as_zeroes(self) -> bool:
        return not self._reused

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = bytearray(length)
        await in_thread(self._thread, lambda: self._partial.read_into(offset, memoryview(buffer)))
        return buffer

    async def write(self, offset: int, data: Buffer) -> None:
        await in_thread(self._thread, lambda: self._partial.write(offset, [data]))
        self.written_bytes += len(memoryview(data))

    async def zeroes(self, offset: int, length: int) -> None:
        if self._reused:
            await in_thread(self._thread, lambda: self._punch(offset, length))
        else:
            # The file is new and sparse: every byte that was not written is zero.
            check_range(offset=offset, length=length, size=self._partial.size)

    def _punch(self, offset: int, length: int) -> None:
        for extent in list(self._partial.extents(offset, length)):
            if not extent.hole:
                self._partial.write_zeroes(extent.offset, extent.length)

    async def flush(self) -> None:
        await in_thread(self._thread, self._flush)

    def _flush(self) -> None:
        self._partial.flush()
        os.posix_fadvise(self._partial.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    async def finish(self) -> None:
        await in_thread(self._thread, self._finish)
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
            raise device_error(f"{self._path}: completing it failed", error) from error
        self._close()

    async def abort(self) -> None:
        try:
            await asyncio.shield(in_thread(self._thread, self._abort))
        finally:
            self._thread.shutdown(wait=False)

    def _abort(self) -> None:
        if not self._reused:  # what it held before cannot be had again
            with contextlib.suppress(OSError):
                self._partial.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._partial.close()
        if self._replaced is not None:
            self._replaced.close()


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
