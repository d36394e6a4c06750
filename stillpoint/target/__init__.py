"""Where an image is written to: a file, a block device or an NBD export.

Invariants:
- Nothing that exists is destroyed without `force`, and nothing that is too small or in use is touched at all.
- What is not finished never looks complete. A file is written as `NAME.partial` and renamed at `finish`. The first MiB
  of a device or export, where partition table and superblock lie, is zeroed first and written last.
- Over an older state (`differences`), an existing file is `NAME.partial` until it is complete again; a restore that
  fails leaves it so, and the next one goes on there.
- `finish` returns when everything is durable. An error on the way fails the whole: nothing is retried into success.
"""

from __future__ import annotations

import contextlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..devices import FileDevice
from ..errors import InvalidRequest
from .differences import DifferencesTarget
from .disk import DiskTarget, FileDisk
from .file import FileTarget
from .interface import Target
from .nbd import NbdDisk
from .stream import ArchiveTarget, StreamTarget
from .verified import VerifiedTarget

__all__ = ["ArchiveTarget", "StreamTarget", "Target", "open_target"]


async def open_target(
    target: str, *, size: int, force: bool = False, differences: bool = False, verify: bool = False
) -> Target:
    """Open a file, a block device or an `nbd://` URI for an image of `size` bytes.

    force: write over a file that exists, or a device that is not empty. differences: over what is there too, but only
    where it differs, which is read for that. verify: read everything back before it is complete.
    Raises AlreadyExists (a file), Refused (too small, not empty), InUse, InvalidRequest, NotFound (no such folder),
    PermissionRefused, PeerUnavailable (NBD) or DeviceError. Nothing was changed then.
    """
    if size <= 0:
        raise InvalidRequest(f"{target}: an image of {size} bytes cannot be written")
    if not target or "\0" in target:
        raise InvalidRequest(f"{target!r} is not the name of a target")
    opened = await _open(target, size=size, force=force, reuse=differences)
    if differences:
        opened = DifferencesTarget(opened)
    return VerifiedTarget(opened) if verify else opened


async def _open(target: str, *, size: int, force: bool, reuse: bool) -> Target:
    if target.startswith(("nbd://", "nbd+unix://")):
        return await DiskTarget.open(await NbdDisk.connect(target), size=size, force=force or reuse)
    if "://" in target:
        raise InvalidRequest(f"{target}: is neither a path nor an nbd:// URI")
    path = Path(os.path.realpath(target))
    if _is_block_device(path):
        thread = ThreadPoolExecutor(1, thread_name_prefix="target")
        disk = FileDisk(FileDevice(path), thread)
        return await DiskTarget.open(disk, size=size, force=force or reuse)
    if reuse:
        return await FileTarget.reuse(path, size=size)
    return await FileTarget.create(path, size=size, force=force)


def _is_block_device(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(path.stat().st_mode)
    return False
