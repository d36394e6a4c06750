"""What the primary tells Prometheus: the clients' traffic, each volume and how far its standby is behind."""

from __future__ import annotations

from stillpoint.metrics import Families, nbd_statistics
from stillpoint.wire.v1 import primary_pb2

from .node import PrimaryNode
from .service import describe

_STATES = {
    primary_pb2.PAIR_STATE_DISCONNECTED: "disconnected",
    primary_pb2.PAIR_STATE_SYNCING: "syncing",
    primary_pb2.PAIR_STATE_IN_SYNC: "in_sync",
    primary_pb2.PAIR_STATE_SPLIT_BRAIN: "split_brain",
}


async def gather(node: PrimaryNode, families: Families) -> None:
    families.nbd_server(nbd_statistics(node.nbd), exports="volumes")
    for name, volume in sorted(node.volumes.items()):
        described = describe(volume, node)
        families.traffic(volume.export.traffic, exports="volumes", volume=name)
        text = "NBD clients that use the volume."
        families.gauge("volume_connections", text, described.clients, volume=name)
        text = "NBD requests that wait for a standby."
        families.gauge("volume_requests_waiting", text, volume.export.waiting_count, volume=name)
        families.gauge("volume_size_bytes", "Size of the volume.", described.size, volume=name)
        text = "1: this node's disk refused a write or flush of the volume."
        families.gauge("volume_failed", text, bool(described.failure), volume=name)
        _pair(families, described.pair, name)


def _pair(families: Families, pair: primary_pb2.Pair, volume: str) -> None:
    families.state("pair_state", "1 for the present state.", _STATES[pair.state], _STATES.values(), volume=volume)
    text = "Since when the pair is in its state, Unix time."
    families.gauge("pair_since_timestamp_seconds", text, pair.since_ns / 1e9, volume=volume)
    families.gauge("pair_dirty_bytes", "What has to be copied to the standby.", pair.dirty_bytes, volume=volume)
    text = "Written on both nodes, not yet known to be durable on the standby."
    families.gauge("pair_unflushed_bytes", text, pair.unflushed_bytes, volume=volume)
    text = "Sent to the standby and not acknowledged."
    families.gauge("pair_in_flight_bytes", text, pair.in_flight_bytes, volume=volume)
    text = "How long the oldest write that the standby has not acknowledged has been on its way."
    families.gauge("pair_lag_seconds", text, pair.lag_ms / 1000, volume=volume)
    text = "What the last comparison with the mirror found to differ and was not repaired."
    families.gauge("pair_mismatch_bytes", text, pair.mismatch_bytes, volume=volume)
    text = "When the last comparison with the mirror ended, Unix time; 0: none since the node started."
    families.gauge("pair_verified_timestamp_seconds", text, pair.verified_ns / 1e9, volume=volume)
