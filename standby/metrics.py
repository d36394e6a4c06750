"""What the standby tells Prometheus: its mirrors, their snapshots, the stores, and the export process."""

from __future__ import annotations

from collections import Counter
from typing import Any

from stillpoint.metrics import Families
from stillpoint.traffic import Traffic
from stillpoint.wire.v1 import standby_pb2

from .cow import SnapshotState
from .mirror import Mirror
from .node import StandbyNode
from .service import describe_mirror, describe_store

_STATES = {
    standby_pb2.MIRROR_STATE_DISCONNECTED: "disconnected",
    standby_pb2.MIRROR_STATE_SYNCING: "syncing",
    standby_pb2.MIRROR_STATE_IN_SYNC: "in_sync",
    standby_pb2.MIRROR_STATE_FAILED: "failed",
    standby_pb2.MIRROR_STATE_SERVED: "served",
}
_SNAPSHOT_STATES = {SnapshotState.ACTIVE: "active", SnapshotState.CREATING: "creating"}


async def gather(node: StandbyNode, families: Families) -> None:
    for _, mirror in sorted(node.mirrors.items()):
        _mirror(families, mirror)
    for store in node.stores.list():
        _store(families, describe_store(store))
    # Asked last: it is another process, and while it is waited for everything above may change.
    _export(families, await node.export.statistics())


def _mirror(families: Families, mirror: Mirror) -> None:
    described = describe_mirror(mirror)
    volume = described.volume
    state = _STATES[described.state]
    families.state("mirror_state", "1 for the present state.", state, _STATES.values(), volume=volume)
    text = "Since when the mirror is in its state, Unix time."
    families.gauge("mirror_since_timestamp_seconds", text, described.since_ns / 1e9, volume=volume)
    text = "Bytes received over the data link, frames and all."
    families.counter("mirror_received_bytes", text, mirror.received_bytes, volume=volume)
    text = "Writes held in memory until what they overwrite is preserved."
    families.gauge("mirror_staged_bytes", text, described.staged_bytes, volume=volume)
    snapshots = mirror.engine.snapshots()
    counts = Counter(_SNAPSHOT_STATES.get(snapshot.state, "invalid") for snapshot in snapshots)
    for each in ("active", "creating", "invalid"):
        families.gauge("snapshots", "Snapshots there are.", counts[each], volume=volume, state=each)
    created_ns = [snapshot.created_ns for snapshot in snapshots if snapshot.state is SnapshotState.ACTIVE]
    if created_ns:
        text = "When the oldest valid snapshot was taken, Unix time."
        families.gauge("snapshot_oldest_timestamp_seconds", text, min(created_ns) / 1e9, volume=volume)
        text = "When the newest valid snapshot was taken, Unix time."
        families.gauge("snapshot_newest_timestamp_seconds", text, max(created_ns) / 1e9, volume=volume)


def _store(families: Families, store: standby_pb2.Store) -> None:
    families.gauge("store_size_bytes", "Room of the store as it is.", store.size, store=store.name)
    text = "What the store may grow to by itself; its size when it does not grow."
    families.gauge("store_size_max_bytes", text, store.size_max or store.size, store=store.name)
    families.gauge("store_used_bytes", "Bytes in use.", store.used_bytes, store=store.name)
    text = "Part in use of what the store may grow to, 0 to 1."
    families.gauge("store_used_ratio", text, store.used_percent / 100, store=store.name)
    text = "1: the store is out of service."
    families.gauge("store_failed", text, bool(store.failure), store=store.name)


def _export(families: Families, statistics: dict[str, Any] | None) -> None:
    """statistics: None when the export process does not answer."""
    families.gauge("export_up", "1: the process that serves snapshots answers.", statistics is not None)
    if statistics is None:
        return
    families.nbd_server(statistics, exports="snapshots")
    families.gauge("export_streams", "Snapshots being read over gRPC.", statistics["streams"])
    text = "Snapshot bytes sent over gRPC."
    families.counter("export_stream_bytes", text, statistics["stream_bytes"])
    families.gauge("export_resident_memory_bytes", "Memory of the export process.", statistics["resident"])
    for volume, traffic in sorted(statistics["traffic"].items()):
        families.traffic(Traffic.from_document(traffic), exports="snapshots", volume=volume)
