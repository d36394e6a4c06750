"""The data node's end of the socket to its failover agent.

    async with AgentLink.open(path, node, report_every_s=…) as link:
    …right before each read is answered and each write admitted:  link.may_serve(volume)
    …a write is answered when all of these acknowledged it:       link.awaited(volume)

Everything runs on the node's loop; `may_serve` is a look-up and two comparisons. When the agent goes, the deadlines it
gave still stand, and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol
from uuid import UUID

from stillpoint.errors import PeerUnavailable

from .member import Part
from .messages import (
    LINE_SIZE_MAX,
    AskPledges,
    FromNode,
    HandOver,
    Order,
    PledgeAnswer,
    PledgeAsked,
    PledgeGiven,
    Report,
    VolumeReport,
    decode_from_agent,
    encode,
)


class DataNode(Protocol):
    """What the link needs of the node. Called on the loop; none of these may block."""

    async def report(self) -> tuple[VolumeReport, ...]:
        """All volumes as they are, after the data path has proven itself by a real read and write. As long as this
        takes, nothing is reported: a data path that hangs loses its lease."""
        ...

    def ordered(self, order: Order) -> None:
        """A volume's part, deadline or set changed."""
        ...

    def ask_pledges(self, wanted: AskPledges) -> None:
        """Ask these nodes, each by its own link's `pledge`; tell `AgentLink.pledged` who says yes."""
        ...


class AgentLink:
    def __init__(self, node: DataNode, writer: asyncio.StreamWriter, *, report_every_s: float) -> None:
        self._node = node
        self._writer = writer
        self._report_every_s = report_every_s
        self._orders: dict[UUID, Order] = {}
        self._pledges: dict[int, asyncio.Future[bool]] = {}
        self._pledge_count = 0
        self._changed = asyncio.Event()

    # --- what the data path asks

    def may_serve(self, volume: UUID) -> bool:
        """Also after the agent has gone, up to the deadline that it gave."""
        order = self._orders.get(volume)
        return order is not None and order.part is Part.PRIMARY and time.monotonic() < order.serves_until_s

    def awaited(self, volume: UUID) -> frozenset[str]:
        order = self._orders.get(volume)
        return order.awaited if order is not None else frozenset()

    # --- what the node tells

    def changed(self) -> None:
        """Report soon, not only when it is time again."""
        self._changed.set()

    async def pledge(self, volume: UUID, *, epoch: int) -> bool:
        """Asked by the primary of `epoch`, on another node. False also when the agent is gone."""
        self._pledge_count += 1
        asked = self._pledge_count
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._pledges[asked] = answer
        try:
            self._tell(PledgeAsked(asked, volume, epoch))
            async with asyncio.timeout(self._report_every_s * 8):
                return await answer
        except TimeoutError:
            return False
        finally:
            del self._pledges[asked]

    def pledged(self, wanted: AskPledges, node: str) -> None:
        self._tell(PledgeGiven(wanted.volume, node, wanted.sent_s))

    def hand_over(self, volume: UUID, to: str) -> None:
        """Switch over: this node has stopped serving, and every member has flushed.

        An Order says STOPPED when it is done, and PRIMARY with a deadline when it could not be: `to` is no member.
        """
        self._tell(HandOver(volume, to))

    def _tell(self, message: FromNode) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    # --- the connection

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, node: DataNode, *, report_every_s: float) -> AsyncIterator[AgentLink]:
        """For one life of the agent. The body is cancelled, and PeerUnavailable raised, when the agent goes."""
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=LINE_SIZE_MAX)
        except OSError as error:
            raise PeerUnavailable(f"the failover agent does not answer at {path}: {error.strerror}") from None
        link = cls(node, writer, report_every_s=report_every_s)
        try:
            async with asyncio.TaskGroup() as tasks:
                workers = (tasks.create_task(link._listen(reader)), tasks.create_task(link._keep_reporting()))
                yield link
                for worker in workers:
                    worker.cancel()
        finally:
            writer.close()

    async def _keep_reporting(self) -> None:
        while True:
            self._changed.clear()
            sent_s = time.monotonic()
            self._tell(Report(sent_s, await self._node.report()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._report_every_s):
                    await self._changed.wait()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await reader.readline()
            except (OSError, ValueError) as error:
                raise PeerUnavailable(f"the failover agent: {error}") from None
            if not line:
                raise PeerUnavailable("the failover agent is gone; this node stops serving when its lease ends")
            match decode_from_agent(line):
                case Order() as order:
                    self._orders[order.volume] = order
                    self._node.ordered(order)
                case AskPledges() as wanted:
                    self._node.ask_pledges(wanted)
                case PledgeAnswer(asked, given):
                    if (waiting := self._pledges.get(asked)) is not None and not waiting.done():
                        waiting.set_result(given)
