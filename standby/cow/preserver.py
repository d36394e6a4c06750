"""Preserving the blocks a stage overwrites, and then applying the stage. Runs in a worker thread; waits for disks.

The order is the whole point; a crash may strike between any two steps:

    1. pre-images are read from the mirror and handed to the store, with their records
    2. the store is made durable (R1: pre-image and new birth are one record)
    3. map entries are published, then births (a reader that sees the new birth finds the entry)
    4. the staged changes are applied in place, in order

Until 4 the mirror is as it was, so a crash before 2 loses nothing that is needed and a crash after it finds records
that say what the mirror still says. A failure in 1-3 leaves everything consistent and is reported, so that the caller
can make room and try again; what was preserved before the failure stays preserved.

The blocks of a stage are marked, so the event loop leaves their births, entries and bytes alone meanwhile.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from stillpoint.devices import BlockDevice
from stillpoint.errors import DeviceError, StoreFull

from .association import Addresses
from .birth import Blocks, Generations
from .preservation import PreImages, PreservationStore
from .stage import Stage
from .values import NO_GENERATION
from .volume import Targets, Volume

_PIECE_SIZE: Final = 4 << 20  # bytes of pre-images in memory at a time
_MANY_BLOCKS: Final = 16  # from this length on it pays to ask the mirror whether there is but a hole to read


class Trouble(enum.Enum):
    """Why preserving stopped, and so which snapshots have to go."""

    STORE_FULL = enum.auto()
    STORE_FAILED = enum.auto()
    MAP_FULL = enum.auto()  # no space for the association map
    MIRROR_UNREADABLE = enum.auto()
    CAP_REACHED = enum.auto()  # of what the snapshots of one volume may hold


@dataclass(frozen=True, slots=True)
class Failure:
    trouble: Trouble
    reason: str
    store: PreservationStore | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    """Blocks that are in a store, not published yet."""

    blocks: Blocks
    addresses: Addresses
    born: Generations


def carry_out(volume: Volume, stage: Stage, targets: Targets) -> Failure | None:
    """Preserve what the stage overwrites, then apply it. Not None: nothing was applied, make room and call again.

    Raises DeviceError when the mirror refuses a change; the mirror is then not to be trusted.
    """
    blocks = stage.blocks(volume.shift)
    failure = preserve(volume, blocks, targets, new_birth=stage.epoch)
    if failure is None:
        volume.births.array[blocks] = stage.epoch
        for change in stage.changes:
            change.apply(volume.mirror)
    return failure


def preserve(volume: Volume, blocks: Blocks, targets: Targets, *, new_birth: int) -> Failure | None:
    """Preserve those of `blocks` that a live snapshot sees. Durable and published on return, also when it failed."""
    if targets.to == NO_GENERATION:
        return None
    born = volume.births.array[blocks]
    durable = born.astype(np.int64) <= targets.durable_to
    in_memory = ~durable & (born.astype(np.int64) <= targets.to)
    for store, wanted in ((targets.durable_store, blocks[durable]), (targets.store, blocks[in_memory])):
        if len(wanted):
            assert store is not None
            failure = _preserve_in(volume, store, wanted, to=targets.to, new_birth=new_birth)
            if failure is not None:
                return failure
    return None


def _preserve_in(
    volume: Volume, store: PreservationStore, blocks: Blocks, *, to: int, new_birth: int
) -> Failure | None:
    kept: list[_Kept] = []
    failure = None
    try:
        for images in _pre_images(volume, blocks, to=to, new_birth=new_birth):
            addresses = store.preserve(images)
            volume.count_preserved(addresses, 1)
            kept.append(_Kept(images.blocks, addresses, images.born))
    except StoreFull as error:
        failure = Failure(Trouble.STORE_FULL, str(error), store)
    except DeviceError as error:
        trouble = Trouble.STORE_FAILED if store.failed else Trouble.MIRROR_UNREADABLE
        failure = Failure(trouble, str(error), store)
    if kept and not store.failed:
        try:
            store.synchronize()
        except DeviceError as error:
            return Failure(Trouble.STORE_FAILED, str(error), store)
        failure = _publish(volume, kept, to=to, new_birth=new_birth) or failure
    return failure


def _pre_images(volume: Volume, blocks: Blocks, *, to: int, new_birth: int) -> Iterator[PreImages]:
    """The blocks as the mirror holds them, in pieces that share one buffer."""
    size = volume.block_size
    limit = max(1, _PIECE_SIZE // size)
    buffer = memoryview(bytearray(min(limit, len(blocks)) * size))
    for start in range(0, len(blocks), limit):
        piece = blocks[start : start + limit]
        data = buffer[: len(piece) * size]
        read_blocks(volume.mirror, piece, data, size)
        yield PreImages(volume.incarnation, size, piece, volume.births.array[piece], to, new_birth, data)


def _publish(volume: Volume, kept: list[_Kept], *, to: int, new_birth: int) -> Failure | None:
    """Entry first, birth second: a reader that sees the new birth must find the entry."""
    kept.sort(key=lambda piece: int(piece.blocks[0]))
    blocks = np.concatenate([piece.blocks for piece in kept])
    addresses = np.concatenate([piece.addresses for piece in kept])
    try:
        volume.maps[to].put_many(blocks, addresses, np.concatenate([piece.born for piece in kept]))
    except OSError as error:
        # The records are in the log, so their slots stay taken: after a restart they are entries again.
        return Failure(Trouble.MAP_FULL, f"no space for the association map: {error.strerror}")
    volume.births.array[blocks] = new_birth
    return None


def read_blocks(device: BlockDevice, blocks: Blocks, data: memoryview, block_size: int) -> None:
    """Fill `data` with the blocks, which ascend. Long holes of the device are not read. Raises DeviceError."""
    for start, end in runs(blocks):
        view = data[start * block_size : end * block_size]
        offset = int(blocks[start]) * block_size
        # Asking where data ends costs as much as the data is long, far beyond what is read here.
        if end - start < _MANY_BLOCKS or not next(iter(device.extents(offset, 1))).hole:
            device.read_into(offset, view)
            continue
        for extent in device.extents(offset, len(view)):
            target = view[extent.offset - offset : extent.end - offset]
            if extent.hole:
                target[:] = bytes(extent.length)
            else:
                device.read_into(extent.offset, target)


def runs(blocks: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(start, end) of the stretches of `blocks` that are neighbours on the device."""
    if len(blocks) == 1:
        yield 0, 1
        return
    borders = (np.flatnonzero(np.diff(blocks) != 1) + 1).tolist()
    yield from zip([0, *borders], [*borders, len(blocks)], strict=True)
