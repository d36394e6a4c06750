"""The durable and the pure half of staying one disk: generations, metadata, handshake, transitions. See README.md."""

from . import transitions
from .generations import HISTORY_MAX, Generation, mint
from .handshake import By, Decision, Outcome, Reason, Role, Side, Source, decide, maps_agree
from .state import PEERS_MAX, Fence, Flags, PeerState, ReplicaState
from .superblock import ReplicaFile

__all__ = [
    "HISTORY_MAX",
    "PEERS_MAX",
    "By",
    "Decision",
    "Fence",
    "Flags",
    "Generation",
    "Outcome",
    "PeerState",
    "Reason",
    "ReplicaFile",
    "ReplicaState",
    "Role",
    "Side",
    "Source",
    "decide",
    "maps_agree",
    "mint",
    "transitions",
]
