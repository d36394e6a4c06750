"""`replica.meta`: a copy's state in two slots, written in turn. Format: README.md, "replica.meta".

Invariants
- A state that `write` returned for is found again, whatever happens after, until the next one is.
- Only the slot that does not hold the current state is ever written.

Crash points of `write`: anywhere before the end of the fdatasync the slot may hold the new state or any part of it. A
part has no valid checksum, and the other slot stands. A whole one is a state that nothing depended on yet, which every
transition allows to be found.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from uuid import UUID

from stillpoint.checksum import crc32
from stillpoint.document import fsync_folder
from stillpoint.errors import AlreadyExists, DataCorrupt, DeviceError, InvalidRequest, NotFound, Refused

from .generations import HISTORY_MAX, Generation
from .handshake import Role
from .state import NAME_BYTES_MAX, PEERS_MAX, Fence, Flags, PeerState, ReplicaState

SLOT_SIZE = 4096
MAGIC = b"SPREPLI1"
# Of the layout. Anything a version 1 reader could misunderstand gets a required feature bit instead of a new version.
VERSION = 1
# Bits this code understands. None is defined yet.
REQUIRED_FEATURES = 0

_HEAD = struct.Struct("<8sIIIIQ")  # magic, version, required, optional features, 0, sequence
_COPY = struct.Struct(f"<16s16s{NAME_BYTES_MAX}sQIIII")  # volume, node, name, size, role, flags, epoch, session
_GENERATION = struct.Struct("<I16s")
_PEER = struct.Struct(f"<16s{NAME_BYTES_MAX}sI")  # node, name, session; then two generations
_COUNTS = struct.Struct("<II")  # peers, history
_CRC = struct.Struct("<I")
_PEER_SIZE = _PEER.size + 2 * _GENERATION.size
_COPY_AT = _HEAD.size
_CURRENT_AT = _COPY_AT + _COPY.size
_COUNTS_AT = _CURRENT_AT + _GENERATION.size
_PEERS_AT = _COUNTS_AT + _COUNTS.size
_HISTORY_AT = _PEERS_AT + PEERS_MAX * _PEER_SIZE
_CRC_AT = SLOT_SIZE - _CRC.size
assert _HISTORY_AT + HISTORY_MAX * _GENERATION.size <= _CRC_AT

_BLANK_SLOT = bytes(SLOT_SIZE)


class ReplicaFile:
    """The open file. One writer; the caller holds the lock of the state directory."""

    def __init__(self, path: Path, descriptor: int, state: ReplicaState, sequence: int, *, damaged: bool) -> None:
        self.path = path
        self.state = state
        # One slot was unreadable: the last write was cut short, or the disk lost it. Worth a line in the log.
        self.damaged = damaged
        self._descriptor = descriptor
        self._sequence = sequence

    @classmethod
    def create(cls, path: Path, state: ReplicaState) -> ReplicaFile:
        """Durable on return. Raises AlreadyExists, DeviceError; then there is none."""
        if path.exists():
            raise AlreadyExists(f"{path} exists")
        fresh = path.with_name(path.name + ".new")
        try:
            descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                _write_all(descriptor, _BLANK_SLOT + encode(state, sequence=1), 0)
                os.fsync(descriptor)
                os.rename(fresh, path)
                fsync_folder(path.parent)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise DeviceError(f"cannot create {path}: {error.strerror}", error.errno or 0) from error
        return cls(path, descriptor, state, 1, damaged=False)

    @classmethod
    def open(cls, path: Path) -> ReplicaFile:
        """Raises NotFound, DataCorrupt when neither slot can be believed, Refused when it is of a later release."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"{path} does not exist") from None
        except OSError as error:
            raise DeviceError(f"cannot open {path}: {error.strerror}", error.errno or 0) from error
        try:
            data = os.pread(descriptor, 2 * SLOT_SIZE, 0)
            slots = [data[at : at + SLOT_SIZE] for at in (0, SLOT_SIZE)]
            decoded = [decode(slot) for slot in slots]
            # One that a misdirected write put into the other's place is not believed.
            found = [slot for index, slot in enumerate(decoded) if slot is not None and slot[0] % 2 == index]
            if not found:
                raise DataCorrupt(f"{path}: neither slot is whole; the copy needs a full resync from another node")
            sequence, state = max(found, key=lambda pair: pair[0])
            damaged = len(found) + slots.count(_BLANK_SLOT) < 2
        except OSError as error:
            os.close(descriptor)
            raise DeviceError(f"cannot read {path}: {error.strerror}", error.errno or 0) from error
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, state, sequence, damaged=damaged)

    def write(self, state: ReplicaState) -> None:
        """Durable on return. Raises DeviceError; `state` is then the one before, and what depended on it must not
        happen."""
        if state == self.state:
            return
        sequence = self._sequence + 1
        try:
            _write_all(self._descriptor, encode(state, sequence=sequence), sequence % 2 * SLOT_SIZE)
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise DeviceError(f"cannot write {self.path}: {error.strerror}", error.errno or 0) from error
        self.state, self._sequence = state, sequence

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ReplicaFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def encode(state: ReplicaState, *, sequence: int) -> bytes:
    """One slot. Raises InvalidRequest for a name that does not fit."""
    slot = bytearray(SLOT_SIZE)
    _HEAD.pack_into(slot, 0, MAGIC, VERSION, REQUIRED_FEATURES, 0, 0, sequence)
    _COPY.pack_into(
        slot,
        _COPY_AT,
        state.volume.bytes,
        state.node.bytes,
        _encode_name(state.name),
        state.size,
        state.role.value,
        int(state.flags),
        state.fence.epoch,
        state.fence.session,
    )
    _put_generation(slot, _CURRENT_AT, state.current)
    _COUNTS.pack_into(slot, _COUNTS_AT, len(state.peers), len(state.history))
    for index, peer in enumerate(state.peers):
        at = _PEERS_AT + index * _PEER_SIZE
        _PEER.pack_into(slot, at, peer.uuid.bytes, _encode_name(peer.name), peer.session)
        _put_generation(slot, at + _PEER.size, peer.generation)
        _put_generation(slot, at + _PEER.size + _GENERATION.size, peer.bitmap)
    for index, generation in enumerate(state.history):
        _put_generation(slot, _HISTORY_AT + index * _GENERATION.size, generation)
    _CRC.pack_into(slot, _CRC_AT, crc32(memoryview(slot)[:_CRC_AT]))
    return bytes(slot)


def decode(slot: bytes) -> tuple[int, ReplicaState] | None:
    """Sequence and state; None for a slot that is blank or not whole. Raises Refused for one of a later release."""
    if len(slot) != SLOT_SIZE or _CRC.unpack_from(slot, _CRC_AT)[0] != crc32(slot[:_CRC_AT]):
        return None
    magic, version, required, _optional, _reserved, sequence = _HEAD.unpack_from(slot)
    if magic != MAGIC:
        return None
    if version != VERSION or required & ~REQUIRED_FEATURES:
        raise Refused(
            f"the replica's metadata was written by a later release (version {version}, features {required:#x}); "
            "start that release"
        )
    volume, node, name, size, role, flags, epoch, session = _COPY.unpack_from(slot, _COPY_AT)
    peer_count, history_count = _COUNTS.unpack_from(slot, _COUNTS_AT)
    try:
        if peer_count > PEERS_MAX or history_count > HISTORY_MAX:
            raise ValueError(f"{peer_count} peers and {history_count} earlier generations")
        state = ReplicaState(
            volume=UUID(bytes=volume),
            node=UUID(bytes=node),
            name=_decode_name(name),
            size=size,
            role=Role(role),
            flags=Flags(flags),
            fence=Fence(epoch, session),
            current=_get_generation(slot, _CURRENT_AT),
            peers=tuple(_get_peer(slot, _PEERS_AT + index * _PEER_SIZE) for index in range(peer_count)),
            history=tuple(_get_past(slot, _HISTORY_AT + index * _GENERATION.size) for index in range(history_count)),
        )
    except ValueError as error:
        # The checksum held, so these are the bytes that were written: not by us.
        raise DataCorrupt(f"the replica's metadata makes no sense: {error}") from None
    return sequence, state


def _put_generation(slot: bytearray, at: int, generation: Generation | None) -> None:
    if generation is not None:
        _GENERATION.pack_into(slot, at, generation.epoch, generation.uuid.bytes)


def _get_generation(slot: bytes, at: int) -> Generation | None:
    epoch, uuid = _GENERATION.unpack_from(slot, at)
    return Generation(epoch, UUID(bytes=uuid)) if any(uuid) else None


def _get_past(slot: bytes, at: int) -> Generation:
    generation = _get_generation(slot, at)
    if generation is None:
        raise ValueError("an empty generation in the history")
    return generation


def _get_peer(slot: bytes, at: int) -> PeerState:
    node, name, session = _PEER.unpack_from(slot, at)
    generation = _get_generation(slot, at + _PEER.size)
    bitmap = _get_generation(slot, at + _PEER.size + _GENERATION.size)
    return PeerState(UUID(bytes=node), _decode_name(name), generation, bitmap, session)


def _encode_name(name: str) -> bytes:
    encoded = name.encode()
    if len(encoded) > NAME_BYTES_MAX or "\0" in name:
        raise InvalidRequest(f"the node name {name!r} does not fit into {NAME_BYTES_MAX} bytes")
    return encoded


def _decode_name(field: bytes) -> str:
    return field.rstrip(b"\0").decode()


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
