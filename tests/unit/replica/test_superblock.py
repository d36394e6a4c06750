"""Every way in which a write of `replica.meta` can end."""

from __future__ import annotations

import errno
import os
import resource
import struct
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from stillpoint.checksum import crc32
from stillpoint.errors import AlreadyExists, DataCorrupt, DeviceError, InvalidRequest, NotFound, Refused
from stillpoint.replica import Fence, Flags, Generation, PeerState, ReplicaFile, ReplicaState, Role
from stillpoint.replica.superblock import SLOT_SIZE, decode, encode

GENERATIONS = [Generation(number, UUID(int=number)) for number in range(1, 40)]
FULL = ReplicaState(
    volume=UUID(int=1),
    node=UUID(int=2),
    name="n" * 64,
    size=1 << 62,
    role=Role.PRIMARY,
    flags=Flags(63),
    fence=Fence(0xFFFFFFFF, 0xFFFFFFFF),
    current=GENERATIONS[0],
    peers=tuple(
        PeerState(UUID(int=10 + index), "p" * 64, GENERATIONS[20 + index], GENERATIONS[25 + index], 0xFFFFFFFF)
        for index in range(3)
    ),
    history=tuple(GENERATIONS[1:17]),
)
EMPTY = ReplicaState(UUID(int=1), UUID(int=2), "a", 4096, Role.STANDBY)


def _with_two_states(path: Path) -> tuple[bytes, bytes]:
    """The file after EMPTY, then FULL."""
    with ReplicaFile.create(path, EMPTY) as file:
        before = path.read_bytes()
        file.write(FULL)
    return before, path.read_bytes()


def _opened(path: Path) -> ReplicaState:
    with ReplicaFile.open(path) as file:
        return file.state


@pytest.mark.parametrize("state", [EMPTY, FULL])
def test_a_state_is_found_as_it_was_written(tmp_path: Path, state: ReplicaState) -> None:
    ReplicaFile.create(tmp_path / "m", state).close()
    assert _opened(tmp_path / "m") == state
    with pytest.raises(AlreadyExists):
        ReplicaFile.create(tmp_path / "m", state)


def test_the_newest_of_many_states_is_found_whatever_slot_it_is_in(tmp_path: Path) -> None:
    with ReplicaFile.create(tmp_path / "m", EMPTY) as file:
        for session in range(1, 8):
            file.write(replace(EMPTY, fence=Fence(1, session)))
            assert _opened(tmp_path / "m").fence.session == session


def test_an_unchanged_state_is_not_written_again(tmp_path: Path) -> None:
    with ReplicaFile.create(tmp_path / "m", EMPTY) as file:
        before = (tmp_path / "m").read_bytes()
        file.write(replace(EMPTY))
        assert (tmp_path / "m").read_bytes() == before


def test_a_write_that_was_cut_short_leaves_the_state_before(tmp_path: Path) -> None:
    before, after = _with_two_states(tmp_path / "m")
    first_difference = next(at for at in range(len(before)) if before[at] != after[at])
    last_difference = max(at for at in range(len(before)) if before[at] != after[at])
    for cut in range(0, len(after) + 1, 512):
        (tmp_path / "m").write_bytes(after[:cut] + before[cut:])
        with ReplicaFile.open(tmp_path / "m") as file:
            whole = cut > last_difference
            assert file.state == (FULL if whole else EMPTY), cut
            assert file.damaged == (first_difference < cut <= last_difference), cut


def test_sectors_that_arrived_in_any_order_leave_the_state_before(tmp_path: Path) -> None:
    before, after = _with_two_states(tmp_path / "m")
    sectors = SLOT_SIZE // 512
    for arrived in range(1 << sectors):
        pieces = [
            (after if arrived >> sector & 1 else before)[sector * 512 : (sector + 1) * 512] for sector in range(sectors)
        ]
        (tmp_path / "m").write_bytes(b"".join(pieces) + before[SLOT_SIZE:])
        assert _opened(tmp_path / "m") in (EMPTY, FULL)
        same = b"".join(pieces) == after[:SLOT_SIZE]
        assert _opened(tmp_path / "m") == (FULL if same else EMPTY)


def test_a_cut_write_is_followed_by_one_into_the_same_slot(tmp_path: Path) -> None:
    before, after = _with_two_states(tmp_path / "m")
    (tmp_path / "m").write_bytes(after[:512] + before[512:])
    with ReplicaFile.open(tmp_path / "m") as file:
        file.write(FULL)
        assert (tmp_path / "m").read_bytes() == after


def test_no_flipped_bit_goes_unnoticed() -> None:
    slot = bytearray(encode(FULL, sequence=2))
    for bit in range(SLOT_SIZE * 8):
        slot[bit // 8] ^= 1 << bit % 8
        assert decode(bytes(slot)) is None
        slot[bit // 8] ^= 1 << bit % 8
    assert decode(bytes(slot)) == (2, FULL)


def test_a_damaged_newer_slot_leaves_the_older_and_is_reported(tmp_path: Path) -> None:
    _, after = _with_two_states(tmp_path / "m")
    (tmp_path / "m").write_bytes(bytes([after[0] ^ 1]) + after[1:])
    with ReplicaFile.open(tmp_path / "m") as file:
        assert file.state == EMPTY
        assert file.damaged


def test_two_damaged_slots_are_refused(tmp_path: Path) -> None:
    _, after = _with_two_states(tmp_path / "m")
    for content in (b"", bytes(2 * SLOT_SIZE), after[:100], bytes([after[0] ^ 1]) + after[1:SLOT_SIZE] + bytes(4096)):
        (tmp_path / "m").write_bytes(content)
        with pytest.raises(DataCorrupt, match="neither slot is whole"):
            ReplicaFile.open(tmp_path / "m")
    with pytest.raises(NotFound):
        ReplicaFile.open(tmp_path / "absent")


def test_a_slot_in_the_place_of_the_other_is_not_believed(tmp_path: Path) -> None:
    _, after = _with_two_states(tmp_path / "m")
    (tmp_path / "m").write_bytes(after[SLOT_SIZE:] + after[:SLOT_SIZE])
    with pytest.raises(DataCorrupt):
        ReplicaFile.open(tmp_path / "m")


def _signed(slot: bytearray) -> bytes:
    struct.pack_into("<I", slot, SLOT_SIZE - 4, crc32(bytes(slot[:-4])))
    return bytes(slot)


@pytest.mark.parametrize(("offset", "name"), [(8, "version 2"), (12, "features 0x2")])
def test_a_later_release_is_refused_and_never_overwritten(tmp_path: Path, offset: int, name: str) -> None:
    """Even beside a slot that could be read: that one is out of date."""
    _, after = _with_two_states(tmp_path / "m")
    slot = bytearray(after[:SLOT_SIZE])
    struct.pack_into("<I", slot, offset, 2)
    (tmp_path / "m").write_bytes(_signed(slot) + after[SLOT_SIZE:])
    with pytest.raises(Refused, match=name):
        ReplicaFile.open(tmp_path / "m")


def test_an_optional_feature_of_a_later_release_is_no_obstacle(tmp_path: Path) -> None:
    slot = bytearray(encode(FULL, sequence=2))
    struct.pack_into("<I", slot, 16, 4)
    assert decode(_signed(slot)) == (2, FULL)


@pytest.mark.parametrize(
    ("offset", "value", "size"),
    [(136, 3, "<I"), (172, 4, "<I"), (176, 17, "<I"), (176, 1, "<I"), (176, 2**31, "<I"), (64, 255, "<I")],
)
def test_a_slot_that_makes_no_sense_is_refused(offset: int, value: int, size: str) -> None:
    slot = bytearray(encode(EMPTY, sequence=2))
    struct.pack_into(size, slot, offset, value)
    with pytest.raises(DataCorrupt, match="makes no sense"):
        decode(_signed(slot))


def test_a_name_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with ReplicaFile.create(tmp_path / "m", EMPTY) as file:
        before = (tmp_path / "m").read_bytes()
        for name in ("ü" * 33, "a\0b"):
            with pytest.raises(InvalidRequest):
                file.write(replace(EMPTY, name=name))
        assert (tmp_path / "m").read_bytes() == before


def test_a_failed_write_counts_as_not_written_and_is_followed_by_one_into_the_same_slot(tmp_path: Path) -> None:
    with ReplicaFile.create(tmp_path / "m", EMPTY) as file:
        file.write(FULL)  # slot 0
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The kernel refuses to write beyond the limit: the second slot now fails with EFBIG.
        resource.setrlimit(resource.RLIMIT_FSIZE, (SLOT_SIZE, hard))
        try:
            with pytest.raises(DeviceError) as failure:
                file.write(EMPTY)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert failure.value.errno == errno.EFBIG
        assert file.state == FULL == _opened(tmp_path / "m")
        file.write(EMPTY)
    assert _opened(tmp_path / "m") == EMPTY


def test_a_failed_fdatasync_counts_as_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ReplicaFile.create(tmp_path / "m", EMPTY) as file:

        def fail(descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patched:
            patched.setattr("os.fdatasync", fail)
            with pytest.raises(DeviceError):
                file.write(FULL)
        assert file.state == EMPTY
        file.write(replace(FULL, size=8192))
    assert _opened(tmp_path / "m").size == 8192
