"""standbyctl status: is everything well, and if not, what is wrong.

The judgement is `find_problems`, a pure function of what the nodes said; the rest asks and shows.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click
from google.protobuf.message import Message

from ..config import Address, format_size
from ..errors import NotFound, StillpointError
from ..wire.v1 import backup_pb2, common_pb2, export_pb2, primary_pb2, replica_pb2, standby_pb2
from .command import Command as SharedCommand
from .command import Invocation, asynchronous, pass_invocation
from .failover import replica_document
from .mirror import mirror_document
from .nodes import STATUS_TIMEOUT_S, Node, Nodes
from .output import Output, format_age, format_seconds, iso_time, plural
from .places import ask as ask_places
from .store import store_document, used_cell
from .volume import mode_word, pair_cell, volume_document, writers_cell

M = TypeVar("M", bound=Message)

WATCH_INTERVAL_S = 1.0
_SERVED = standby_pb2.MIRROR_STATE_SERVED
# Of the levels at which a store warns, those that are a problem; below, there is time to think.
_STORE_PROBLEM_PERCENT = 85
_STORE_URGENT_PERCENT = 95


@dataclass(slots=True)
class ClusterState:
    """What each process said of itself; None when it did not answer, and then `unreachable` says why."""

    primary: primary_pb2.PrimaryStatus | None = None
    standby: standby_pb2.StandbyStatus | None = None
    # Each data node has both roles: what the standby's host serves, and what the primary's mirrors.
    promoted: primary_pb2.PrimaryStatus | None = None
    following: standby_pb2.StandbyStatus | None = None
    replicas: list[replica_pb2.Replica] = field(default_factory=list)
    export: export_pb2.ExportStatus | None = None
    backup: backup_pb2.BackupStatus | None = None
    unreachable: dict[str, str] = field(default_factory=dict)
    addresses: dict[str, Address] = field(default_factory=dict)

    def volumes(self, only: str | None) -> list[primary_pb2.Volume]:
        served = [volume for status in (self.primary, self.promoted) if status for volume in status.volumes]
        return _chosen(served, only, "name")

    def server_of(self, volume: primary_pb2.Volume) -> str:
        return "primary" if self.primary is not None and volume in self.primary.volumes else "standby"

    def mirrors(self, only: str | None) -> list[standby_pb2.Mirror]:
        """Copies that follow a primary."""
        held = [mirror for status in (self.standby, self.following) if status for mirror in status.mirrors]
        return _chosen([mirror for mirror in held if mirror.state != _SERVED], only, "volume")

    def snapshot_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for status in (self.standby, self.following):
            for mirror in status.mirrors if status else ():
                counts[mirror.volume] = counts.get(mirror.volume, 0) + mirror.snapshot_count
        return counts


def _chosen(items: Sequence[M], only: str | None, key: str) -> list[M]:
    return sorted(
        (item for item in items if only in (None, getattr(item, key))), key=lambda item: str(getattr(item, key))
    )


async def ask_cluster(nodes: Nodes) -> ClusterState:
    state = ClusterState()

    first, second = nodes.data_nodes

    async def ask(node: Node, answer: type[M]) -> M | None:
        state.addresses[node.name] = node.address
        try:
            return await node.call("GetStatus", common_pb2.Empty(), answer, timeout_s=STATUS_TIMEOUT_S)
        except StillpointError as error:
            state.unreachable[node.name] = str(error).partition(";")[0]
            return None

    (
        state.primary,
        state.following,
        state.standby,
        state.promoted,
        state.export,
        state.backup,
    ) = await asyncio.gather(
        ask(first.serving, primary_pb2.PrimaryStatus),
        ask(first.mirroring, standby_pb2.StandbyStatus),
        ask(second.mirroring, standby_pb2.StandbyStatus),
        ask(second.serving, primary_pb2.PrimaryStatus),
        ask(nodes.export, export_pb2.ExportStatus),
        ask(nodes.backup, backup_pb2.BackupStatus),
    )
    state.replicas = [copy.replica for copy in (await ask_places(nodes)).copies]
    return state


def find_problems(state: ClusterState, only: str | None = None) -> list[str]:
    """One line for each thing that is not as it should be, the worst first; none means healthy."""
    problems = list(state.unreachable.values())
    for volume in state.volumes(only):
        if volume.failure:
            problems.append(f"{volume.name}: the primary's device failed: {volume.failure}")
        if volume.read_failures:
            problems.append(
                f"{volume.name}: the primary's device FAILED {volume.read_failures} reads; "
                f"{format_size(volume.repaired_bytes)} came from the standby and were written back: replace it"
            )
        if volume.refusing or volume.suspended:
            problems.append(
                f"{volume.name}: writes are {writers_cell(volume)}; `standbyctl mirror resume {volume.name}`"
            )
        if volume.pair.state != primary_pb2.PAIR_STATE_IN_SYNC:
            problems.append(_apart(volume))
        if volume.pair.mismatch_bytes:
            differs = format_size(volume.pair.mismatch_bytes)
            problems.append(
                f"{volume.name}: {differs} of the mirror DIFFER; `standbyctl mirror verify {volume.name} --repair`"
            )
    mirrored = {volume.name for volume in state.volumes(only)}
    for mirror in state.mirrors(only):
        if mirror.state == standby_pb2.MIRROR_STATE_FAILED:
            problems.append(f"{mirror.volume}: the mirror failed: {mirror.detail or 'see the log of the standby'}")
        elif mirror.volume not in mirrored:
            problems.append(f"{mirror.volume}: no node that answers serves it; `standbyctl promote {mirror.volume}`")
    for store in state.standby.stores if state.standby else ():
        if store.failure:
            problems.append(f"store {store.name}: {store.failure}")
        elif store.warning_percent >= _STORE_PROBLEM_PERCENT:
            problems.append(_filling(store))
    if state.backup and only is None:
        problems += state.backup.problems
    return problems


def find_notices(state: ClusterState) -> list[str]:
    """One line for each thing that will be a problem if nobody does anything."""
    stores = state.standby.stores if state.standby else ()
    return [
        _filling(store) for store in stores if not store.failure and 0 < store.warning_percent < _STORE_PROBLEM_PERCENT
    ]


def _filling(store: standby_pb2.Store) -> str:
    what = f"store {store.name} is {used_cell(store)} full"
    if store.warning_percent < _STORE_PROBLEM_PERCENT:
        return what
    remedy = "delete snapshots"
    if store.kind == standby_pb2.STORE_KIND_FILE:
        remedy += f", or enlarge it with `standbyctl store extend {store.name} --size SIZE`"
    if store.warning_percent < _STORE_URGENT_PERCENT:
        return f"{what}; {remedy}"
    return f"{what}, and when it is full the oldest snapshots are lost; {remedy}"


def _apart(volume: primary_pb2.Volume) -> str:
    pair = volume.pair
    parts = [f"{volume.name} is NOT IN SYNC"]
    if pair.state == primary_pb2.PAIR_STATE_SYNCING:
        parts.append(f"syncing, {format_size(pair.dirty_bytes)} to go")
        if pair.resync_rate:
            parts.append(f"{format_size(pair.resync_rate)}/s")
            parts.append(f"{format_seconds(pair.dirty_bytes / pair.resync_rate)} left")
    else:
        parts.append(
            f"the standby lacks {format_size(pair.dirty_bytes)}" if pair.dirty_bytes else "nothing to copy yet"
        )
        if pair.since_ns:
            parts.append(f"apart for {format_age(pair.since_ns)}")
    return ": ".join(filter(None, (", ".join(parts), pair.detail)))


def require_volume(state: ClusterState, name: str) -> None:
    """Raise NotFound when the nodes that answered do not know the volume."""
    if state.volumes(name) or state.mirrors(name):
        return
    if state.primary is not None:
        raise NotFound(f"there is no volume {name}; `standbyctl volume list` shows those there are")


def status_document(state: ClusterState, only: str | None) -> dict[str, Any]:
    problems = find_problems(state, only)
    return {
        "healthy": not problems,
        "problems": problems,
        "notices": find_notices(state),
        "nodes": {
            "primary": _node_document(state, "primary", state.primary),
            "standby": _node_document(state, "standby", state.standby),
            "export": _node_document(state, "standby's export", state.export),
            "backup": _node_document(state, "backup node", state.backup),
        },
        "volumes": [volume_document(volume) for volume in state.volumes(only)],
        "mirrors": [mirror_document(mirror) for mirror in state.mirrors(only)],
        "replicas": [replica_document(replica) for replica in state.replicas if only in (None, replica.volume)],
        "stores": [store_document(store) for store in (state.standby.stores if state.standby else ())],
        "backups": {
            "count": state.backup.backup_count if state.backup else None,
            "repository": state.backup.repository if state.backup else None,
            "repository_bytes": state.backup.repository_bytes if state.backup else None,
            "running": state.backup.running if state.backup else None,
        },
    }


def _node_document(state: ClusterState, name: str, answer: Any) -> dict[str, Any]:
    document: dict[str, Any] = {"up": answer is not None, "address": str(state.addresses[name])}
    if answer is not None:
        info: common_pb2.NodeInfo = answer.info
        document |= {
            "pid": info.pid,
            "version": info.version,
            "started": iso_time(info.started_ns),
            "resident_bytes": info.resident_bytes,
        }
    else:
        document["error"] = state.unreachable[name]
    return document


def show_status(output: Output, state: ClusterState, only: str | None) -> None:
    output.table(("NODE", "STATE", "ADDRESS", "PID>", "UP FOR>", "MEMORY>"), _node_rows(state))
    volumes = state.volumes(only)
    snapshots = state.snapshot_counts()
    output.line()
    output.table(
        ("VOLUME", "SERVED BY", "SIZE>", "MODE", "PAIR", "BEHIND>", "CLIENTS>", "SNAPSHOTS>"),
        [
            (
                volume.name,
                state.server_of(volume),
                format_size(volume.size),
                mode_word(volume.mode),
                pair_cell(volume.pair.state),
                format_size(volume.pair.dirty_bytes),
                str(volume.clients),
                str(snapshots[volume.name]) if volume.name in snapshots else "?",
            )
            for volume in volumes
        ],
        empty="no volumes" if state.primary else "volumes unknown: the primary does not answer",
    )
    if state.standby and state.standby.stores:
        output.line()
        output.table(
            ("STORE", "SIZE>", "USED>", "FULL>"),
            [
                (store.name, format_size(store.size), format_size(store.used_bytes), used_cell(store))
                for store in state.standby.stores
            ],
        )
    if state.backup:
        size = format_size(state.backup.repository_bytes)
        output.line(f"\n{plural(state.backup.backup_count, 'backup')}, {size} in {state.backup.repository}")
    output.line()
    problems = find_problems(state, only)
    for problem in problems:
        output.alarm(problem)
    for notice in find_notices(state):
        output.line(f"note: {notice}")
    if not problems:
        output.line("healthy: every node answers and every volume is in sync")


def _node_rows(state: ClusterState) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, answer in (
        ("primary", state.primary),
        ("standby", state.standby),
        ("standby's export", state.export),
        ("backup node", state.backup),
    ):
        address = str(state.addresses[name])
        if answer is None:
            rows.append((name, "DOWN", address, "", "", ""))
            continue
        info = answer.info
        rows.append((name, "up", address, str(info.pid), format_age(info.started_ns), format_size(info.resident_bytes)))
    return rows


@click.command(cls=SharedCommand)
@click.argument("volume", required=False)
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@pass_invocation
@click.pass_context
@asynchronous
async def status(context: click.Context, invocation: Invocation, volume: str | None, watch: bool) -> None:
    """Show what runs, and what is wrong.

    Exit code 0: healthy; 1: something is wrong.

    \b
    Example: standbyctl status
             standbyctl status vol1 --watch
    """
    if watch and invocation.output.as_json:
        raise click.UsageError("--watch is for people; with --json ask again and again instead", context)
    output = invocation.output
    async with invocation.nodes() as nodes:
        while True:
            state = await ask_cluster(nodes)
            if volume is not None:
                require_volume(state, volume)
            if watch and sys.stdout.isatty():
                click.clear()
            if output.as_json:
                output.document(status_document(state, volume))
            else:
                show_status(output, state, volume)
            if not watch:
                break
            sys.stdout.flush()
            await asyncio.sleep(WATCH_INTERVAL_S)
    if find_problems(state, volume):
        context.exit(1)
