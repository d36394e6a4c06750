"""Proves that a backup is of use: exports it, and runs a check of its file system, or the operator's command, over it.

The command sees a disk that it may write to: what it writes goes to an overlay that is thrown away, so that a file
system can replay its journal. It finds the disk in its environment:

    STILLPOINT_NBD_URI    on a Unix socket that only this user can reach
    STILLPOINT_DEVICE     a path that can be read and written like a disk, by nbdfuse; empty where that cannot be used
    STILLPOINT_BACKUP, STILLPOINT_VOLUME

Exit code 0 is a pass. Without a command, the file system is told by its magic; ext2, ext3 and ext4 are known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillpoint.errors import ConfigError
from stillpoint.nbd.listen import listen_unix, uri
from stillpoint.nbd.server import NbdServer

from .export import BackupExport
from .hooks import HookFailed, run_hook
from .overlays import Overlays
from .repository import BackupReader, BackupRecord

logger = logging.getLogger(__name__)

_PREFIX: Final = "restore-test-"
_MOUNT_TIMEOUT_S: Final = 20.0
# e2fsck: 1 is "errors were corrected", which a replayed journal counts as.
_EXT_ACCEPTED: Final = (0, 1)
_EXT_MAGIC: Final = (1080, b"\x53\xef")


@dataclass(frozen=True, slots=True)
class RestoreTestConfig:
    """command: with its arguments, run without a shell; none: a check of the file system."""

    command: tuple[str, ...] = ()
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ConfigError(f"restore_test.timeout_s is {self.timeout_s:g}; it must be above 0")


@dataclass(frozen=True, slots=True)
class RestoreTestResult:
    """detail: the end of what the command said, or why it failed."""

    passed: bool
    detail: str
    finished_ns: int
    duration_ns: int


class RestoreTest:
    """folder: for overlays and mounts; what a crash left there is removed first."""

    def __init__(self, folder: Path, config: RestoreTestConfig, executor: Executor) -> None:
        self._folder = folder
        self._config = config
        self._executor = executor

    async def run(self, record: BackupRecord, open_reader: Callable[[], BackupReader]) -> RestoreTestResult:
        """A backup that cannot be read is a failed test. Raises Refused, and DeviceError for want of room."""
        started_ns = time.monotonic_ns()
        try:
            async with self._disk(record, open_reader) as (address, device):
                detail = await self._check(record, address, device)
            passed = True
        except HookFailed as error:
            passed, detail = False, str(error)
        return RestoreTestResult(passed, detail, time.time_ns(), time.monotonic_ns() - started_ns)

    async def _check(self, record: BackupRecord, address: str, device: str) -> str:
        command: Sequence[str] = self._config.command
        accepted: Sequence[int] = (0,)
        if not command:
            command, accepted = await asyncio.to_thread(_file_system_check, device)
        environment = {
            "STILLPOINT_NBD_URI": address,
            "STILLPOINT_DEVICE": device,
            "STILLPOINT_BACKUP": record.id,
            "STILLPOINT_VOLUME": record.origin.volume,
        }
        return await run_hook(command, environment=environment, timeout_s=self._config.timeout_s, accepted=accepted)

    @asynccontextmanager
    async def _disk(
        self, record: BackupRecord, open_reader: Callable[[], BackupReader]
    ) -> AsyncIterator[tuple[str, str]]:
        """(its address, its path or "")."""
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=_PREFIX) as folder, _socket_folder() as sockets:
            overlays = Overlays(Path(folder))
            await asyncio.to_thread(overlays.create, record)
            export = BackupExport(record, open_reader, self._executor, overlays)
            server = NbdServer({export.name: export}, self._executor)
            try:
                listener = listen_unix(sockets / "nbd")
                server.listen([listener])
                address = uri(listener, export.name)
                async with _mounted(address, Path(folder) / "mount") as device:
                    yield address, device
            finally:
                await server.stop()
                await asyncio.to_thread(export.close)


def remove_leftovers(folder: Path) -> None:
    """Of tests that a crash ended."""
    for left in folder.glob(f"{_PREFIX}*"):
        _unmount(left / "mount")
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _socket_folder() -> Iterator[Path]:
    # The path of a socket has 107 bytes at most, and a state directory may be longer.
    with tempfile.TemporaryDirectory(prefix="stillpoint-") as folder:
        yield Path(folder)


@asynccontextmanager
async def _mounted(address: str, mount: Path) -> AsyncIterator[str]:
    """The disk as a file, "" where there is no nbdfuse or it may not mount."""
    program = shutil.which("nbdfuse")
    if program is None:
        yield ""
        return
    mount.mkdir()
    # So that it ends with this process, whatever ends that.
    lifeline = [path, "--pdeathsig", "TERM"] if (path := shutil.which("setpriv")) else []
    process = await asyncio.create_subprocess_exec(
        *lifeline, program, str(mount / "disk"), address, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        device = mount / "disk"
        # In a thread: looking into a mount that this process serves may need the loop.
        if await asyncio.to_thread(_appears, device, lambda: process.returncode is None):
            yield str(device)
        else:
            logger.warning("nbdfuse cannot mount here, so a restore test has no path, only an NBD address")
            yield ""
    finally:
        await asyncio.to_thread(_unmount, mount)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await process.wait()


def _appears(path: Path, may_come: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _MOUNT_TIMEOUT_S
    while not path.exists():
        if not may_come() or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _unmount(mount: Path) -> None:
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is not None:
        command = [program, "-u", "-z", "-q", str(mount)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _file_system_check(device: str) -> tuple[Sequence[str], Sequence[int]]:
    """Command and exit codes that are a pass. Raises HookFailed."""
    if not device:
        raise HookFailed("without nbdfuse no file system can be checked; install it, or name a restore_test.command")
    offset, magic = _EXT_MAGIC
    try:
        with open(device, "rb") as disk:
            disk.seek(offset)
            found = disk.read(len(magic))
    except OSError as error:
        raise HookFailed(f"the backup cannot be read: {error.strerror}") from None
    if found != magic:
        raise HookFailed("it holds no file system that is known here; name a restore_test.command")
    program = shutil.which("e2fsck") or "/sbin/e2fsck"
    return (program, "-f", "-p", device), _EXT_ACCEPTED
