"""Where each volume is served and mirrored now: roles change hands, so commands ask before they act."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import NotFound, PeerUnavailable, Refused, StillpointError
from ..wire.v1 import common_pb2, replica_pb2, standby_pb2
from .command import SnapshotId
from .nodes import DataNode, Nodes

T = TypeVar("T")

# A node that lives answers at once; one that does not must not hold up a command about the other.
ASK_TIMEOUT_S = 2.0

PRIMARY, STANDBY = replica_pb2.REPLICA_ROLE_PRIMARY, replica_pb2.REPLICA_ROLE_STANDBY


@dataclass(frozen=True, slots=True)
class Copy:
    """One node's copy of a volume, as the node describes it."""

    node: DataNode
    replica: replica_pb2.Replica


@dataclass(slots=True)
class Places:
    """What the data nodes said. silent: those that did not answer, and why."""

    copies: list[Copy] = field(default_factory=list)
    silent: dict[str, StillpointError] = field(default_factory=dict)

    def of(self, volume: str) -> list[Copy]:
        """Raises NotFound; or what hid the answer, where a node is silent."""
        found = [copy for copy in self.copies if copy.replica.volume == volume]
        if not found:
            for error in self.silent.values():
                raise error
            raise NotFound(f"there is no volume {volume!r}; `standbyctl volume list` shows those there are")
        return found

    def served(self, volume: str) -> DataNode:
        """The node that serves it; of two after a split, the one promoted last.

        Raises NotFound, or the error of a silent node that may serve it.
        """
        found = self.of(volume)
        serving = [copy for copy in found if copy.replica.role == PRIMARY]
        if serving:
            return max(serving, key=lambda copy: copy.replica.epoch).node
        for error in self.silent.values():
            raise error
        raise NotFound(
            f"no node serves volume {volume!r}; `standbyctl promote {volume}` makes one of its copies the one that does"
        )

    def mirrored(self, volume: str) -> DataNode:
        """The node that takes snapshots of it: its standby, or where none answers the node that serves it."""
        found = self.of(volume)
        standbys = [copy for copy in found if copy.replica.role == STANDBY]
        return (standbys or found)[0].node


async def ask(nodes: Nodes) -> Places:
    places = Places()

    async def ask_one(node: DataNode) -> Iterable[replica_pb2.Replica]:
        answer = await node.replicas.call(
            "ListReplicas", common_pb2.Empty(), replica_pb2.ReplicaList, timeout_s=ASK_TIMEOUT_S
        )
        return answer.replicas

    data_nodes = nodes.data_nodes
    answers = await asyncio.gather(*(ask_one(node) for node in data_nodes), return_exceptions=True)
    for node, answer in zip(data_nodes, answers, strict=True):
        if isinstance(answer, StillpointError):
            places.silent[node.name] = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            places.copies.extend(Copy(node, replica) for replica in answer)
    return places


async def where_served(nodes: Nodes, volume: str) -> DataNode:
    """Raises NotFound, PeerUnavailable."""
    return (await ask(nodes)).served(volume)


async def where_mirrored(nodes: Nodes, volumes: Sequence[str]) -> DataNode:
    """The one node that takes snapshots of all of them. Raises NotFound, PeerUnavailable, Refused."""
    places = await ask(nodes)
    found = {node.name: node for node in map(places.mirrored, volumes)}
    for volume, silent in itertools.product(volumes, places.silent.values()):
        # The node that serves a volume takes snapshots of it too, if it has been a standby before.
        request = standby_pb2.ListSnapshotsRequest(volume=volume)
        try:
            await places.mirrored(volume).mirroring.call("ListSnapshots", request, standby_pb2.SnapshotList)
        except NotFound:
            raise silent from None
    if len(found) > 1:
        raise Refused(
            f"the volumes {', '.join(volumes)} have their standbys on different nodes, {' and '.join(found)}, "
            "so there is no one instant of all of them; switch one over, or take them apart"
        )
    return next(iter(found.values()))


async def where_snapshot(nodes: Nodes, identity: SnapshotId) -> tuple[DataNode, standby_pb2.Snapshot]:
    """The node that holds the snapshot, and what it says of it. Raises NotFound, PeerUnavailable."""
    request = standby_pb2.SnapshotName(volume=identity.volume, name=identity.name)
    return await _first(nodes, lambda node: node.mirroring.call("GetSnapshot", request, standby_pb2.Snapshot))


async def where_bookmark(nodes: Nodes, volume: str, name: str) -> DataNode:
    """Raises NotFound, PeerUnavailable."""
    request = standby_pb2.ListBookmarksRequest(volume=volume)

    async def find(node: DataNode) -> None:
        answer = await node.mirroring.call("ListBookmarks", request, standby_pb2.BookmarkList)
        if all(each.name != name for each in answer.bookmarks):
            raise NotFound(f"{volume}: there is no bookmark {name}")

    return (await _first(nodes, find))[0]


async def _first(nodes: Nodes, ask_one: Callable[[DataNode], Awaitable[T]]) -> tuple[DataNode, T]:
    """The first data node that has an answer, the one whose place it is to hold snapshots first."""
    missing: NotFound | None = None
    silent: StillpointError | None = None
    for node in reversed(nodes.data_nodes):
        try:
            return node, await ask_one(node)
        except NotFound as error:
            missing = missing or error
        except PeerUnavailable as error:
            silent = silent or error
    raise silent or missing or NotFound("there is no data node")


async def from_all(nodes: Nodes, ask_one: Callable[[DataNode], Awaitable[T]]) -> list[tuple[DataNode, T]]:
    """What every data node answers. One that is silent is left out, unless the others had nothing to say.

    Raises NotFound, PeerUnavailable.
    """
    answers: list[tuple[DataNode, T]] = []
    failures: list[StillpointError] = []
    for node in nodes.data_nodes:
        try:
            answers.append((node, await ask_one(node)))
        except (NotFound, PeerUnavailable) as error:
            failures.append(error)
    silent = [error for error in failures if isinstance(error, PeerUnavailable)]
    if silent and not any(answer for _, answer in answers):
        raise silent[0]
    if not answers:
        raise failures[0]
    return answers
