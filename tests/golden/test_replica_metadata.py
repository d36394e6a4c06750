"""The bytes of `replica.meta`, as stillpoint/replica/README.md describes them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from uuid import UUID

from stillpoint.replica import Fence, Flags, Generation, PeerState, ReplicaFile, ReplicaState, Role

VOLUME, NODE, PEER = (UUID(int=number << 120 | number) for number in (0x11, 0x22, 0x33))
STATE = ReplicaState(
    volume=VOLUME,
    node=NODE,
    name="töne",
    size=5 << 40,
    role=Role.STANDBY,
    flags=Flags.CONSISTENT | Flags.DISCARD,
    fence=Fence(7, 9),
    current=Generation(6, UUID(int=0x61)),
    peers=(PeerState(PEER, "other", Generation(5, UUID(int=0x51)), None, 8),),
    history=(Generation(5, UUID(int=0x51)), Generation(4, UUID(int=0x41))),
)


def _generation(epoch: int, uuid: int) -> bytes:
    return struct.pack("<I", epoch) + uuid.to_bytes(16, "big")


def test_golden_bytes(tmp_path: Path) -> None:
    ReplicaFile.create(tmp_path / "replica.meta", STATE).close()
    data = (tmp_path / "replica.meta").read_bytes()
    assert data[:4096] == bytes(4096)
    slot = data[4096:]
    assert len(slot) == 4096
    assert slot[:32] == b"SPREPLI1" + struct.pack("<IIIIQ", 1, 0, 0, 0, 1)
    assert slot[32:64] == VOLUME.bytes + NODE.bytes
    assert slot[64:128] == "töne".encode().ljust(64, b"\0")
    assert slot[128:152] == struct.pack("<QIIII", 5 << 40, 2, 33, 7, 9)
    assert slot[152:172] == _generation(6, 0x61)
    assert slot[172:180] == struct.pack("<II", 1, 2)
    assert slot[180:264] == PEER.bytes + b"other".ljust(64, b"\0") + struct.pack("<I", 8)
    assert slot[264:304] == _generation(5, 0x51) + bytes(20)
    assert slot[304:552] == bytes(248)
    assert slot[552:592] == _generation(5, 0x51) + _generation(4, 0x41)
    assert slot[592:4092] == bytes(3500)
    assert slot[4092:] == struct.pack("<I", zlib.crc32(slot[:4092]))
