"""What two copies tell each other about generations, as the payloads of data link frames and fields of messages.

RESYNC_BEGIN: the base of the resync, one generation. RESYNC_END of a resync: the source's whole state, one slot of
`replica.meta`; of a session in which nothing had to be sent: nothing.
"""

from __future__ import annotations

import struct
from uuid import UUID

from ..errors import ProtocolError
from .generations import Generation
from .state import ReplicaState
from .superblock import decode, encode

_GENERATION = struct.Struct("<I16s")  # epoch, uuid


def pack_generation(generation: Generation) -> bytes:
    return _GENERATION.pack(generation.epoch, generation.uuid.bytes)


def unpack_generation(payload: bytes | memoryview) -> Generation:
    """Raises ProtocolError."""
    if len(payload) != _GENERATION.size:
        raise ProtocolError(f"a generation of {len(payload)} bytes")
    epoch, uuid = _GENERATION.unpack(payload)
    return Generation(epoch, UUID(bytes=uuid))


def pack_state(state: ReplicaState) -> bytes:
    return encode(state, sequence=0)


def unpack_state(payload: bytes | memoryview) -> ReplicaState:
    """Raises ProtocolError, and Refused for the state of a later release."""
    decoded = decode(bytes(payload))
    if decoded is None:
        raise ProtocolError("the peer did not send the state of its copy")
    return decoded[1]
