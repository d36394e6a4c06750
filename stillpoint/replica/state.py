"""What one node durably knows of its copy of a volume and of the other nodes' copies. Values only.

How it changes is told in `transitions.py`; how it is kept, in `superblock.py`; what follows from two of them when the
nodes meet, in `handshake.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from uuid import UUID

from stillpoint.errors import NotFound

from .generations import Generation
from .handshake import Role, Side

PEERS_MAX = 3
NAME_BYTES_MAX = 64


class Flags(enum.IntFlag):
    """CONSISTENT: the content is one that the volume had; off while a resync is writing to it.
    UP_TO_DATE: nobody has told this node of newer content.
    CRASHED_PRIMARY: was primary, and has not handed over cleanly since.
    FULL_SYNC_NEEDED: the content is not to be trusted; everything has to come from another copy.
    BLANK: nothing was ever written to the device, so it reads as zeroes.
    DISCARD: an operator decided that what only this copy has is given up.
    """

    CONSISTENT = 1
    UP_TO_DATE = 2
    CRASHED_PRIMARY = 4
    FULL_SYNC_NEEDED = 8
    BLANK = 16
    DISCARD = 32


NO_FLAGS = Flags(0)


@dataclass(frozen=True, slots=True, order=True)
class Fence:
    """Frames of any other epoch and session are refused. Only ever raised."""

    epoch: int = 0
    session: int = 0


@dataclass(frozen=True, slots=True)
class PeerState:
    """What this node knows of the copy on another node.

    generation: the newest generation that the peer may have from us or we from it. As long as that is our current one,
        an acknowledgement without the peer needs a new generation first. None: it never shared one.
    bitmap: names what the two dirty maps are relative to. If both sides hold the same, the copies differ at most where
        one of the two maps says so. None: our map says nothing about this peer.
    session: the last one that both ends took; 0: none.
    """

    uuid: UUID
    name: str
    generation: Generation | None = None
    bitmap: Generation | None = None
    session: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One copy of one volume. role: at the last start or change; it comes back as a standby all the same.

    current: None until the first resync onto an empty copy has finished.
    history: generations this copy has left behind, newest first.
    """

    volume: UUID
    node: UUID
    name: str  # of the node
    size: int  # of the volume, bytes
    role: Role
    flags: Flags = NO_FLAGS
    fence: Fence = Fence()
    current: Generation | None = None
    peers: tuple[PeerState, ...] = ()
    history: tuple[Generation, ...] = ()

    def peer(self, node: UUID) -> PeerState:
        """Raises NotFound."""
        for peer in self.peers:
            if peer.uuid == node:
                return peer
        raise NotFound(f"node {self.name} keeps no copy of this volume together with node {node}")

    def with_peer(self, changed: PeerState) -> ReplicaState:
        """Its entry replaced, or added."""
        if all(peer.uuid != changed.uuid for peer in self.peers):
            return replace(self, peers=(*self.peers, changed))
        return replace(self, peers=tuple(changed if peer.uuid == changed.uuid else peer for peer in self.peers))

    def has(self, flags: Flags) -> bool:
        return flags in self.flags

    def side(self, peer: UUID, *, dirty_bytes: int) -> Side:
        """This copy's half of a handshake. dirty_bytes: in the map kept for that peer, tags not flushed included.

        Raises NotFound.
        """
        known = self.peer(peer)
        return Side(
            volume=self.volume,
            role=self.role,
            current=self.current,
            history=self.history,
            peer_generation=known.generation,
            bitmap=known.bitmap,
            dirty_bytes=dirty_bytes,
            consistent=self.has(Flags.CONSISTENT),
            up_to_date=self.has(Flags.UP_TO_DATE),
            crashed_primary=self.has(Flags.CRASHED_PRIMARY),
            full_sync_needed=self.has(Flags.FULL_SYNC_NEEDED),
            blank=self.has(Flags.BLANK),
            discard=self.has(Flags.DISCARD),
            session=known.session,
        )
