"""standbyctl promote, switchover, rejoin, resolve: which node serves a volume."""

from __future__ import annotations

from typing import Any

import click

from ..config import format_size
from ..errors import InvalidRequest, NotFound, Refused
from ..wire.v1 import replica_pb2
from .command import Command, Invocation, SnapshotId, asynchronous, confirm, pass_invocation, yes_option
from .nodes import Nodes
from .output import Output
from .places import PRIMARY, STANDBY, Copy, ask

# The last writes are applied and flushed first, on a disk that may be slow.
_CHANGE_TIMEOUT_S = 120.0


def role_word(role: replica_pb2.ReplicaRole) -> str:
    return {PRIMARY: "primary", STANDBY: "standby"}.get(role, "unknown")


def replica_document(replica: replica_pb2.Replica) -> dict[str, Any]:
    return {
        "volume": replica.volume,
        "node": replica.node,
        "role": role_word(replica.role),
        "epoch": replica.epoch,
        "generation": replica.generation,
        "up_to_date": replica.up_to_date,
        "consistent": replica.consistent,
        "detail": replica.detail,
        "fallback": replica.fallback,
        "size": replica.size,
    }


def _show(output: Output, replica: replica_pb2.Replica, more: dict[str, Any]) -> None:
    if output.as_json:
        output.document({**replica_document(replica), **more})


def _chosen(copies: list[Copy], node: str, volume: str) -> Copy:
    for copy in copies:
        if node in (copy.node.name, copy.replica.node):
            return copy
    known = ", ".join(copy.replica.node for copy in copies)
    raise NotFound(f"node {node!r} holds no copy of volume {volume!r}, or does not answer; these do: {known}")


@click.command(cls=Command)
@click.argument("volume")
@click.option("--node", help="Whose copy is to be served. [default: the standby that answers]")
@click.option("--snapshot", default="", help="Set the copy back to this snapshot of it first.")
@click.option("--force", is_flag=True, help="Even if another node serves it, or the copy is known to be behind.")
@pass_invocation
@asynchronous
async def promote(invocation: Invocation, volume: str, node: str | None, snapshot: str, force: bool) -> None:
    """Serve a volume from its standby: the node that served it is down.

    A node that still serves it and answers is never taken over without --force: `switchover` hands over without loss.

    \b
    Example: standbyctl promote vol1
    """
    async with invocation.nodes() as nodes:
        copies = (await ask(nodes)).of(volume)
        if node is not None:
            chosen = _chosen(copies, node, volume)
        else:
            standbys = [copy for copy in copies if copy.replica.role == STANDBY]
            if not standbys:
                raise Refused(f"no standby of volume {volume!r} answers; node {copies[0].replica.node} serves it")
            chosen = max(standbys, key=lambda copy: (copy.replica.consistent, copy.replica.up_to_date))
        request = replica_pb2.PromoteRequest(volume=volume, force=force, snapshot=snapshot.rpartition("@")[2])
        answer = await chosen.node.replicas.call(
            "Promote", request, replica_pb2.PromoteResponse, timeout_s=_CHANGE_TIMEOUT_S
        )
        uri = nodes.cluster.nbd_uri(chosen.node.nbd, volume)
    more = {"uri": uri, "duration_s": answer.duration_ns / 1e9}
    _show(invocation.output, answer.replica, more)
    if not invocation.output.as_json:
        invocation.output.line(
            f"{volume} is served by node {answer.replica.node} at {uri} (epoch {answer.replica.epoch}, "
            f"{answer.duration_ns / 1e9:.2f} s)"
        )


@click.command(cls=Command)
@click.argument("volume")
@pass_invocation
@asynchronous
async def switchover(invocation: Invocation, volume: str) -> None:
    """Exchange the roles of the nodes of a volume. Nothing is lost.

    The volume must be in sync. Its clients are disconnected and find it on the other node.

    \b
    Example: standbyctl switchover vol1
    """
    async with invocation.nodes() as nodes:
        places = await ask(nodes)
        before = places.served(volume)
        await before.replicas.call(
            "SwitchOver",
            replica_pb2.SwitchOverRequest(volume=volume),
            replica_pb2.Replica,
            timeout_s=_CHANGE_TIMEOUT_S,
        )
        places = await ask(nodes)
        after = places.served(volume)
        uri = nodes.cluster.nbd_uri(after.nbd, volume)
        replica = next(copy.replica for copy in places.of(volume) if copy.node.name == after.name)
    _show(invocation.output, replica, {"uri": uri})
    if not invocation.output.as_json:
        invocation.output.line(f"{volume} is served by node {replica.node} at {uri}; node {before.name} is its standby")


@click.command(cls=Command)
@click.argument("volume")
@click.option("--node", help="Which node is to follow. [default: the one that served the volume longest ago]")
@pass_invocation
@asynchronous
async def rejoin(invocation: Invocation, volume: str, node: str | None) -> None:
    """Let a node follow the one that was promoted instead of it.

    A node does so by itself as soon as it reaches the other one. It is sent what differs, no more.

    \b
    Example: standbyctl rejoin vol1
    """
    async with invocation.nodes() as nodes:
        copies = (await ask(nodes)).of(volume)
        chosen = _chosen(copies, node, volume) if node is not None else min(copies, key=lambda copy: copy.replica.epoch)
        answer = await chosen.node.replicas.call(
            "Rejoin", replica_pb2.RejoinRequest(volume=volume), replica_pb2.Replica, timeout_s=_CHANGE_TIMEOUT_S
        )
    _show(invocation.output, answer, {})
    if not invocation.output.as_json:
        invocation.output.line(f"node {answer.node} is {role_word(answer.role)} of {volume}")


@click.command(cls=Command)
@click.argument("volume")
@click.option("--keep", required=True, metavar="NODE", help="The node whose content stays.")
@yes_option
@pass_invocation
@asynchronous
async def resolve(invocation: Invocation, volume: str, keep: str, yes: bool) -> None:
    """End a split brain: say which node's content stays.

    Both nodes wrote to the volume without the other one.

    The other node's content stays readable, as a protected snapshot on that node.

    \b
    Example: standbyctl resolve vol1 --keep standby
    """
    async with invocation.nodes() as nodes:
        copies = (await ask(nodes)).of(volume)
        winner = _chosen(copies, keep, volume)
        losers = [copy for copy in copies if copy is not winner]
        if not losers:
            raise InvalidRequest(f"no other node with a copy of volume {volume!r} answers; there is nothing to resolve")
        if not any("SPLIT BRAIN" in copy.replica.detail for copy in copies):
            raise Refused(f"volume {volume!r} is not split: no node says so; `standbyctl status {volume}` shows more")
        size = format_size(winner.replica.size)
        confirm(
            f"Replace the content of {volume} ({size}) on {', '.join(copy.replica.node for copy in losers)} "
            f"by that of {winner.replica.node}?",
            yes=yes,
        )
        if winner.replica.role != PRIMARY:
            promotion = replica_pb2.PromoteRequest(volume=volume, force=True)
            await winner.node.replicas.call(
                "Promote", promotion, replica_pb2.PromoteResponse, timeout_s=_CHANGE_TIMEOUT_S
            )
        request = replica_pb2.OutrankRequest(volume=volume, epoch=max(copy.replica.epoch for copy in losers))
        await winner.node.replicas.call("Outrank", request, replica_pb2.Replica)
        kept = [await _give_up(nodes, copy, winner) for copy in losers]
    if invocation.output.as_json:
        invocation.output.document(
            {"volume": volume, "kept": winner.replica.node, "snapshots": [str(snapshot) for snapshot in kept]}
        )
        return
    for snapshot, loser in zip(kept, losers, strict=True):
        invocation.output.line(f"what node {loser.replica.node} held is readable as {snapshot}, on that node")
    invocation.output.line(f"{volume} goes on with the content of node {winner.replica.node}")


async def _give_up(nodes: Nodes, loser: Copy, winner: Copy) -> SnapshotId:
    volume = loser.replica.volume
    request = replica_pb2.GiveUpRequest(volume=volume, winner=winner.replica.node)
    answer = await loser.node.replicas.call("GiveUp", request, replica_pb2.GiveUpResponse, timeout_s=_CHANGE_TIMEOUT_S)
    return SnapshotId(volume, answer.snapshot)
