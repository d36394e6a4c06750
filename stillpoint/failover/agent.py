"""The agent beside a data node: keeps its lease at etcd, asks for what `Member` wants, kills the node unless it stops.

A process of its own, so that a stall of the data path does not look like a dead node to etcd, and a dead data path does
not look alive.

Invariants
- The lease is kept only while the data node reports, and it reports only what its data path has just proven.
- The node is told a deadline before anything relies on it. By `kill_after_s` past it, the node has said that it
  stopped, or it is killed.
- Each connection of the data node begins as a standby, with another lease. The lease before is ended early only when
  the process that it was for is known to be dead.

One thread calls etcd for the lease and another for the volumes; a slow transaction never makes a keep-alive late.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from uuid import UUID

from stillpoint.errors import Refused, StillpointError

from .config import FailoverConfig
from .etcd import Etcd
from .in_sync_set import Observed, Transaction
from .lease import Lease
from .member import Member, Part, Request
from .messages import (
    LINE_SIZE_MAX,
    AskPledges,
    FromAgent,
    FromNode,
    HandOver,
    Order,
    PledgeAnswer,
    PledgeAsked,
    PledgeGiven,
    VolumeReport,
    decode_from_node,
    encode,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TICKS_PER_KEEPALIVE = 10
_CREDENTIALS = struct.Struct("3i")  # of the peer of a Unix socket: pid, uid, gid


class Volume:
    """One volume of the data node: its member, what the node said last, and what it was told last."""

    def __init__(self, uuid: UUID, member: Member) -> None:
        self.uuid = uuid
        self.member = member
        self.serving = False
        self.ordered: Order | None = None
        self.stop_by_s = float("-inf")
        self.pledges_asked_s = float("-inf")


class DataNode:
    """The connection of one life of the data node. Ends with it."""

    def __init__(self, config: FailoverConfig, tasks: asyncio.TaskGroup, writer: asyncio.StreamWriter) -> None:
        self._config = config
        self._times = config.times
        self._tasks = tasks
        self._writer = writer
        self._tls = config.tls.context() if config.tls else None
        self._lease = Lease(config.times)
        self._volumes: dict[UUID, Volume] = {}
        self._started_s = time.monotonic()
        self._reported_s = float("-inf")
        self._for_lease = _Caller(self._etcd())
        self._for_volumes = _Caller(self._etcd())
        peer: socket.socket = writer.get_extra_info("socket")
        self.pid, _, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        # Held open, so that the kill can never meet another process of the same number.
        self._process = os.pidfd_open(self.pid)

    def _etcd(self) -> Etcd:
        return Etcd(self._config.etcd, timeout_s=self._times.timeout_s, tls=self._tls)

    # --- what the node says

    def heard(self, message: FromNode) -> None:
        match message:
            case PledgeAsked(asked_id, uuid, epoch):
                volume = self._volumes.get(uuid)
                given = volume is not None and volume.member.pledge(time.monotonic(), epoch=epoch)
                self._tell(PledgeAnswer(asked_id, given))
            case PledgeGiven(uuid, node, sent_s):
                if (volume := self._volumes.get(uuid)) is not None:
                    volume.member.pledged(node, sent_s=sent_s)
            case HandOver(uuid, to):
                self._hand_over(self._volumes.get(uuid), to)
            case _:
                # Not after now: a deadline must not follow from a clock that is not ours.
                self._reported_s = max(self._reported_s, min(message.sent_s, time.monotonic()))
                for report in message.volumes:
                    self._take(report)

    def _hand_over(self, volume: Volume | None, to: str) -> None:
        if volume is None:
            return
        try:
            volume.member.hand_over(to)
        except Refused as error:
            logger.warning("%s", error, extra={"volume": str(volume.uuid)})
            volume.ordered = None  # so that it is said once more what holds

    def _take(self, report: VolumeReport) -> None:
        volume = self._volumes.get(report.volume)
        if volume is None:
            member = Member(self._config.node, self._lease, report.copy, started_s=self._started_s)
            volume = self._volumes[report.volume] = Volume(report.volume, member)
        volume.serving = report.serving
        volume.member.copy = report.copy
        for node in report.lost:
            volume.member.lost(node)
        for node, readiness in report.ready.items():
            volume.member.ready(node, readiness)

    # --- time passes

    async def run(self) -> None:
        """Until cancelled, or the node had to be killed."""
        tick_s = self._times.keepalive_s / _TICKS_PER_KEEPALIVE
        before_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            # After a stall of this process, what the node has said meanwhile is still unread.
            stalled = now_s - before_s > self._times.kill_after_s
            before_s = now_s
            self._keep_lease(now_s)
            for volume in self._volumes.values():
                self._step(volume, now_s)
                self._order(volume, now_s)
                if not stalled and self._must_die(volume, now_s):
                    self._kill(volume)
                    return
            await asyncio.sleep(tick_s)

    def _keep_lease(self, now_s: float) -> None:
        alive = now_s - self._reported_s < self._times.keepalive_s
        if not alive or not self._lease.due(now_s) or self._for_lease.busy:
            return
        self._lease.sent(now_s)
        lease_id, ttl_s = self._lease.id, self._times.ttl_s

        def keep(etcd: Etcd) -> tuple[int, float]:
            return (lease_id, etcd.keep_alive(lease_id)) if lease_id else etcd.grant(ttl_s)

        def kept(result: tuple[int, float]) -> None:
            granted_id, left_s = result
            if left_s > 0:
                self._lease.granted(granted_id, sent_s=now_s, ttl_s=left_s)
            else:
                logger.warning("etcd ended this node's lease")
                self._lease.lost()

        self._for_lease.call(self._tasks, keep, kept, lambda error: logger.warning("keep-alive: %s", error))

    def _step(self, volume: Volume, now_s: float) -> None:
        member = volume.member
        if not self._for_volumes.busy and (request := member.next_request(now_s)) is not None:
            self._ask_etcd(volume, request)
        wanted = member.pledges_wanted(now_s)
        if wanted and now_s - volume.pledges_asked_s >= self._times.keepalive_s / 2:
            volume.pledges_asked_s = now_s
            self._tell(AskPledges(volume.uuid, member.epoch, wanted, now_s))

    def _ask_etcd(self, volume: Volume, request: Request) -> None:
        prefix, member = self._config.prefix, volume.member
        before = member.part

        def answered(observed: Observed) -> None:
            member.answered(observed)
            if member.part is not before:
                logger.warning("%s of epoch %d", member.part.value, member.epoch, extra={"volume": str(volume.uuid)})

        def unanswered(error: StillpointError) -> None:
            logger.warning("%s", error, extra={"volume": str(volume.uuid)})
            member.unanswered()

        if isinstance(request, Transaction):
            logger.info("etcd: %s", request, extra={"volume": str(volume.uuid)})
            self._for_volumes.call(
                self._tasks, lambda etcd: etcd.commit(prefix, volume.uuid, request), answered, unanswered
            )
        else:
            self._for_volumes.call(self._tasks, lambda etcd: etcd.read(prefix, volume.uuid), answered, unanswered)

    def _order(self, volume: Volume, now_s: float) -> None:
        """Tell the node what changed. A deadline is never further away than a lease: it dies with this process."""
        member, told = volume.member, volume.ordered
        furthest_s = now_s + self._times.ttl_s - self._times.margin_s
        order = Order(volume.uuid, member.part, member.epoch, min(member.serves_until_s, furthest_s), member.awaited)
        if told is not None and (told.part, told.epoch, told.awaited) == (order.part, order.epoch, order.awaited):
            gained_s = order.serves_until_s - told.serves_until_s
            if 0 <= gained_s < self._times.keepalive_s / 4 or order.serves_until_s == told.serves_until_s:
                return
        volume.ordered = order
        volume.stop_by_s = max(order.serves_until_s, now_s)
        self._tell(order)

    def _must_die(self, volume: Volume, now_s: float) -> bool:
        if volume.ordered is None or volume.ordered.part is Part.STANDBY:
            return False
        stopped = not volume.serving and self._reported_s >= volume.stop_by_s
        return not stopped and now_s >= volume.stop_by_s + self._times.kill_after_s

    def _kill(self, volume: Volume) -> None:
        logger.error("the data node did not stop serving in time; it is killed", extra={"volume": str(volume.uuid)})
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def _tell(self, message: FromAgent) -> None:
        if self._writer.transport.get_write_buffer_size() < LINE_SIZE_MAX:
            self._writer.write(encode(message))  # a node that does not read will be killed, or has no lease to lose

    async def end(self) -> None:
        """The connection is gone. If the process is dead, its leadership goes at once rather than with the lease.

        One that lives may go on serving up to the deadline that it was told: its lease is left to end by itself.
        """
        lease_id = self._lease.id
        if lease_id and await self._has_exited() and not self._for_lease.busy:
            with contextlib.suppress(StillpointError):
                await self._for_lease.call_and_wait(lambda etcd: etcd.revoke(lease_id))
        self._for_lease.close()
        self._for_volumes.close()
        os.close(self._process)

    async def _has_exited(self) -> bool:
        """Waits a little for it: the sockets of a process that dies are closed shortly before it is dead."""
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        loop.add_reader(self._process, exited.set)
        try:
            async with asyncio.timeout(self._times.keepalive_s / 2):
                await exited.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._process)
        return True


class _Caller:
    """One thread with one connection to etcd; one call at a time."""

    def __init__(self, etcd: Etcd) -> None:
        self.busy = False
        self._etcd = etcd
        self._executor = ThreadPoolExecutor(1)

    def call(
        self,
        tasks: asyncio.TaskGroup,
        work: Callable[[Etcd], T],
        done: Callable[[T], None],
        failed: Callable[[StillpointError], None],
    ) -> None:
        async def run() -> None:
            try:
                result = await self.call_and_wait(work)
            except StillpointError as error:
                failed(error)
            else:
                done(result)

        self.busy = True
        tasks.create_task(run())

    async def call_and_wait(self, work: Callable[[Etcd], T]) -> T:
        self.busy = True
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._etcd)
        finally:
            self.busy = False

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._etcd.close()


async def serve(config: FailoverConfig, stop: asyncio.Event) -> None:
    """Until `stop` is set. One data node at a time: another one has to wait until the first has gone."""
    config.socket.unlink(missing_ok=True)
    taken = asyncio.Lock()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with taken:
            try:
                await _attend(config, reader, writer)
            except* (StillpointError, OSError) as group:
                logger.warning("the data node: %s", "; ".join(str(error) for error in group.exceptions))
            finally:
                writer.close()

    old_mask = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(connected, config.socket, limit=LINE_SIZE_MAX)
    finally:
        os.umask(old_mask)
    logger.info("waiting for the data node", extra={"socket": str(config.socket)})
    async with server:
        await stop.wait()


async def _attend(config: FailoverConfig, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async with asyncio.TaskGroup() as tasks:
        node = DataNode(config, tasks, writer)
        logger.info("the data node is here", extra={"pid": node.pid})
        running = tasks.create_task(node.run())
        try:
            while line := await reader.readline():
                node.heard(decode_from_node(line))
            logger.warning("the data node is gone", extra={"pid": node.pid})
        finally:
            running.cancel()
            await node.end()
