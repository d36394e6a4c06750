"""The snapshot engine: copy-on-write snapshots of a mirror, and their virtual devices. README.md tells how and why."""

from __future__ import annotations

from .engine import PendingSnapshot, SnapshotEngine, create_snapshots
from .limits import Limits, OwnLimits
from .store_directory import StoreDirectory
from .values import (
    BLOCK_SIZE_DEFAULT,
    BLOCK_SIZE_MAX,
    BLOCK_SIZE_MIN,
    Bookmark,
    ChangedExtents,
    Snapshot,
    SnapshotState,
    SnapshotStatistics,
    StoreStatistics,
)
from .virtual_device import VirtualDevice, open_virtual_device

__all__ = [
    "BLOCK_SIZE_DEFAULT",
    "BLOCK_SIZE_MAX",
    "BLOCK_SIZE_MIN",
    "Bookmark",
    "ChangedExtents",
    "Limits",
    "OwnLimits",
    "PendingSnapshot",
    "Snapshot",
    "SnapshotEngine",
    "SnapshotState",
    "SnapshotStatistics",
    "StoreDirectory",
    "StoreStatistics",
    "VirtualDevice",
    "create_snapshots",
    "open_virtual_device",
]
