"""Block devices: files, disks, memory, and compositions of them, behind one promise (`base.BlockDevice`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidRequest
from .base import BlockDevice, Buffer
from .concat import ConcatDevice
from .file import FileDevice
from .memory import MemoryDevice
from .overlay import OverlayDevice
from .window import WindowDevice

__all__ = [
    "BlockDevice",
    "Buffer",
    "ConcatDevice",
    "FileDevice",
    "MemoryDevice",
    "OverlayDevice",
    "WindowDevice",
    "open_device",
]

# Files made for one volume end at a multiple of this, all but the last, so that no block lies in two of them.
_SHARE_ALIGNMENT = 1 << 20


def open_device(
    paths: Sequence[Path], *, size: int | None = None, create: bool = False, read_only: bool = False
) -> BlockDevice:
    """Open files and block devices, in this order, as one device.

    size: bytes of the result; None: all there is. What the paths hold beyond `size` is left alone.
    create: make the files that are missing, sparse, sharing evenly what the existing ones lack of `size`.
    Raises InvalidRequest when they hold less than `size`, and what FileDevice raises. Files made by a call that
    fails are removed again, and nothing stays open.
    """
    if not paths:
        raise InvalidRequest("a device needs at least one path")
    if len(set(paths)) != len(paths):
        raise InvalidRequest(f"a path is named twice: {', '.join(map(str, paths))}")
    missing = [path for path in paths if create and not path.exists()]
    if missing and size is None:
        raise InvalidRequest(f"{missing[0]}: does not exist; making it needs a size")
    if size is not None and size <= 0:
        raise InvalidRequest(f"{paths[0]}: a device of {size} bytes makes no sense")
    opened: dict[Path, FileDevice] = {}
    with contextlib.ExitStack() as undo:
        for path in paths:
            if path not in missing:
                opened[path] = FileDevice(path, read_only=read_only)
                undo.callback(opened[path].close)
        lacking = (size or 0) - sum(device.size for device in opened.values())
        for path, share in _shares(missing, lacking):
            opened[path] = FileDevice.create(path, share)
            undo.callback(path.unlink)
            undo.callback(opened[path].close)
        device = _joined([opened[path] for path in paths if path in opened], size)
        undo.pop_all()
    return device


def _shares(paths: Sequence[Path], total: int) -> list[tuple[Path, int]]:
    """How many bytes each of the missing files gets; the existing ones may leave nothing for the last of them."""
    shares = []
    for count, path in zip(range(len(paths), 0, -1), paths, strict=True):
        even = -(-total // count)
        share = min(total, -(-even // _SHARE_ALIGNMENT) * _SHARE_ALIGNMENT)
        if share <= 0:
            raise InvalidRequest(f"{path}: nothing is left for it to hold; leave it out")
        shares.append((path, share))
        total -= share
    return shares


def _joined(parts: Sequence[BlockDevice], size: int | None) -> BlockDevice:
    device = parts[0] if len(parts) == 1 else ConcatDevice(parts)
    if size is None or size == device.size:
        return device
    if device.size < size:
        raise InvalidRequest(f"{device.description}: holds {device.size} bytes, too small for {size}")
    return WindowDevice(device, start=0, length=size)
