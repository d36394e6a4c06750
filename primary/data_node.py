"""A data node: one process that serves volumes and holds mirrors, and changes which of the two it does for a volume.

Both roles work on one `Replica` for each volume, and a change of role is one durable write to it. Whatever was made for
the new role before that write does no harm if it never comes; what is left to do after it is done again at a start.

Promotion:   the session ends, its last writes are applied and flushed · what serving needs is made · ROLE · served
Demotion:    clients cut off, everything flushed · the copy becomes a mirror with snapshots · ROLE · sessions allowed
Switchover:  demotion here, then promotion there. If that is refused, this node promotes itself again; if nobody knows
             whether it happened, nobody serves and the operator is told: two primaries would be worse.

A copy is never overwritten by a resync before a snapshot of it exists (standby/mirror.py); `give_up` makes one that
stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict

from standby.config import StandbyConfig
from standby.mirror import Mirror, MirrorState
from standby.node import StandbyNode
from stillpoint.errors import NotFound, PeerUnavailable, Refused, StillpointError
from stillpoint.replica import Fence, Flags, ReplicaState, mint
from stillpoint.replica.replicas import Replica, Replicas
from stillpoint.replica.transitions import demoted, discarded, epoch_raised, promoted, rolled_back
from stillpoint.tls import Credentials
from stillpoint.wire.v1 import replica_pb2

from .config import PrimaryConfig
from .node import PrimaryNode
from .pair import PairState
from .record import VolumeRecord

logger = logging.getLogger(__name__)

# A primary that is asked whether it lives answers at once, or it is not one that clients could use.
_ALIVE_S = 0.5
_ANY_SESSION = (1 << 32) - 1


class DataNode:
    """Everything runs on the loop."""

    def __init__(
        self,
        serving: PrimaryConfig,
        mirroring: StandbyConfig,
        credentials: Credentials | None,
        *,
        starts_as_primary: bool,
    ) -> None:
        """starts_as_primary: whose ports are opened at once. Raises what opening the copies' metadata raises."""
        self.replicas = Replicas(serving.state_dir, name=serving.node)
        self.standby = StandbyNode(mirroring, self.replicas, credentials, exports_at_once=not starts_as_primary)
        self.primary = PrimaryNode(serving, self.replicas, self.standby, credentials, listens_at_once=starts_as_primary)
        self.standby.served = self.primary
        self.primary.superseded = self._superseded
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._following: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises what a copy that cannot be opened raises."""
        self._remove_unfinished()
        await self.standby.start()
        for replica in self.replicas:
            if not replica.is_primary and replica.volume not in self.standby.mirrors:
                await self._become_mirror(replica)
        await self.primary.start()

    async def stop(self) -> None:
        for task in list(self._following):
            await asyncio.wait([task])
        await self.primary.stop()
        await self.standby.stop()
        self.replicas.close()

    def _remove_unfinished(self) -> None:
        state_dir = self.standby.config.state_dir
        for replica in self.replicas:
            records = (
                state_dir / "volumes" / replica.volume / "volume.json",
                state_dir / "mirrors" / replica.volume / "mirror.json",
            )
            if not any(record.exists() for record in records):
                logger.warning("removing what is left of a copy that was never finished: %s", replica.volume)
                self.replicas.delete(replica.volume)

    # --- becoming primary

    async def promote(self, volume: str, *, force: bool = False, snapshot: str = "", mode: str = "") -> float:
        """Serve the volume from this copy from now on; the seconds it took. Durable, and served, on return.

        mode: how writes are answered; empty: as at the last session. snapshot: set the copy back to it first.
        force: even if another node seems to serve the volume, or this copy is known to be behind.
        Raises NotFound, Refused; then nothing has changed.
        """
        began = time.monotonic()
        async with self._changing[volume]:
            replica = self.replicas.get(volume)
            if replica.is_primary:
                return 0.0
            mirror = self.standby.mirror(volume)
            if not force:
                await self._check_nobody_serves(replica.state)
            self._check_promotable(mirror, snapshot, force=force)
            with mirror.held(f"node {self.replicas.name} is being promoted"):
                await mirror.end_session("this copy is being promoted")
                if snapshot:
                    await mirror.set_back(snapshot)
                    replica.become(rolled_back(replica.state))
                await mirror.engine.flush()
                self.primary.prepare(self._volume_record(mirror, mode))
                state = replica.state
                # Who names the snapshot knows that the copy is behind.
                replica.become(promoted(state, mint(state.fence.epoch + 1), force=force or bool(snapshot)))
                replica.alarm = ""
                mirror.enter(MirrorState.SERVED, "")
            self._serve(volume)
        took = time.monotonic() - began
        logger.warning(
            "promoted", extra={"volume": volume, "epoch": replica.state.fence.epoch, "took_s": round(took, 3)}
        )
        return took

    async def _check_nobody_serves(self, state: ReplicaState) -> None:
        try:
            answer = await self.primary.standby.list_replicas(timeout_s=_ALIVE_S)
        except StillpointError:
            return  # it is down, or cannot be reached: what a promotion is for
        for other in answer.replicas:
            if other.volume_uuid == str(state.volume) and other.role == replica_pb2.REPLICA_ROLE_PRIMARY:
                raise Refused(
                    f"volume {other.volume!r} is served by node {answer.node}, which is alive; "
                    f"hand it over with `standbyctl switchover {other.volume}`"
                )

    def _check_promotable(self, mirror: Mirror, snapshot: str, *, force: bool) -> None:
        volume, state = mirror.record.volume, mirror.replica.state
        if snapshot and mirror.is_whole:
            raise Refused(
                f"volume {volume!r}: the copy on node {self.replicas.name} is whole; promote it as it is, and go back "
                f"with `standbyctl snapshot rollback {volume}@{snapshot}` if you must"
            )
        if snapshot:
            mirror.engine.get(snapshot)
            return
        if mirror.is_whole:
            promoted(state, mint(state.fence.epoch + 1), force=force)  # raises what would refuse it later
            return
        fallback = mirror.fallback
        if fallback is None:
            raise Refused(
                f"volume {volume!r}: the copy on node {self.replicas.name} is not whole: a resync was interrupted, "
                "and there is no snapshot of what it was before; only its primary can complete it"
            )
        age_s = int(time.time() - fallback.created_ns / 1e9)
        raise Refused(
            f"volume {volume!r}: the copy on node {self.replicas.name} is not whole, a resync of it was interrupted; "
            f"as it was {age_s} s ago it can be promoted with --snapshot {fallback.name}"
        )

    def _volume_record(self, mirror: Mirror, mode: str) -> VolumeRecord:
        record = mirror.record
        known = self.primary.record(record.volume)
        if known is not None:
            known.size, known.mode = mirror.engine.size, mode or record.mode
            return known
        return VolumeRecord(
            folder=self.primary.folder(record.volume),
            name=record.volume,
            uuid=record.volume_uuid,
            size=mirror.engine.size,
            block_size=record.block_size,
            mode=mode or record.mode,
            device_paths=record.device_paths,
            created_ns=record.created_ns,
        )

    def _serve(self, volume: str) -> None:
        record = self.primary.record(volume)
        assert record is not None
        self.primary.serve(record)

    # --- becoming standby

    async def switch_over(self, volume: str) -> None:
        """Hand the volume over to its standby, which has every write. This node is its standby on return.

        Raises Refused, and the volume is served here as before; or PeerUnavailable, and the message says what is known.
        """
        async with self._changing[volume]:
            served = self.primary.volume(volume)
            if served.pair.state is not PairState.IN_SYNC:
                raise Refused(f"volume {volume!r} is not in sync; its standby lacks writes: {served.pair.detail}")
            replica = served.replica
            peer = served.pair.peer
            assert peer is not None
            mode = served.record.mode
            await self._stop_serving(replica, clean=True)
            try:
                await self.primary.standby.promote(volume, mode=mode)
            except StillpointError as error:
                await self._take_back(replica, error)
        logger.warning("switched over", extra={"volume": volume, "to": peer.name})

    async def _take_back(self, replica: Replica, error: StillpointError) -> None:
        """The standby was not promoted, or nobody knows. Always raises."""
        volume = replica.volume
        if isinstance(error, PeerUnavailable):
            try:
                answer = await self.primary.standby.list_replicas(timeout_s=_ALIVE_S)
            except StillpointError:
                raise PeerUnavailable(
                    f"volume {volume!r}: the standby stopped answering while it was being promoted, so nobody serves "
                    f"it now; `standbyctl promote {volume}` on the node that is to serve it ({error})"
                ) from None
            if any(
                other.volume == volume and other.role == replica_pb2.REPLICA_ROLE_PRIMARY for other in answer.replicas
            ):
                return
        state = replica.state
        mirror = self.standby.mirror(volume)
        await mirror.end_session("this node takes the volume back")
        replica.become(promoted(state, mint(state.fence.epoch + 1)))
        mirror.enter(MirrorState.SERVED, "")
        self._serve(volume)
        raise Refused(f"volume {volume!r} is served here as before; its standby refused: {error}")

    async def rejoin(self, volume: str) -> None:
        """Become the standby of the node that was promoted. Does nothing on a standby. Raises Refused when no other
        node has a newer copy."""
        replica = self.replicas.get(volume)
        if not replica.is_primary:
            return
        pair = self.primary.volume(volume).pair
        if not pair.is_superseded:
            if pair.state is PairState.SPLIT_BRAIN:
                raise Refused(replica.alarm)
            raise Refused(
                f"volume {volume!r}: no other node is known to have been promoted; {pair.detail or 'in sync'}"
            )
        await self._follow(volume)

    async def outrank(self, volume: str, *, epoch: int) -> None:
        """This node's content is to be kept: sessions from now on are of a later epoch than the other node's."""
        async with self._changing[volume]:
            replica = self.replicas.get(volume)
            replica.become(epoch_raised(replica.state, Fence(epoch, _ANY_SESSION)))

    async def give_up(self, volume: str, *, winner: str) -> str:
        """Let the content here go, for that of node `winner`; the name of the snapshot that keeps it. Durable."""
        if winner == self.replicas.name:
            raise Refused(f"node {winner} is the one whose content is to be kept; ask the other one to give up")
        async with self._changing[volume]:
            replica = self.replicas.get(volume)
            if replica.is_primary:
                await self._stop_serving(replica, clean=False)
            mirror = self.standby.mirror(volume)
            if replica.state.has(Flags.DISCARD) and mirror.record.given_up:
                return mirror.record.given_up
            name = await mirror.keep(f"given-up-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
            mirror.record.given_up = name
            mirror.record.save()
            replica.become(discarded(replica.state))
            replica.alarm = ""
        logger.warning("the copy here is given up", extra={"volume": volume, "kept_as": f"{volume}@{name}"})
        return name

    def _superseded(self, volume: str, why: str) -> None:
        logger.error("this node stops serving: %s", why, extra={"volume": volume})
        task = asyncio.get_running_loop().create_task(self._follow(volume))
        self._following.add(task)
        task.add_done_callback(self._followed)

    def _followed(self, task: asyncio.Task[None]) -> None:
        self._following.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("this node could not become standby", exc_info=error)

    async def _follow(self, volume: str) -> None:
        async with self._changing[volume]:
            replica = self.replicas.get(volume)
            if replica.is_primary:
                await self._stop_serving(replica, clean=False)

    async def _stop_serving(self, replica: Replica, *, clean: bool) -> None:
        """The copy is a mirror on return, and sessions may begin. Raises DeviceError; then it is served again."""
        volume = replica.volume
        try:
            await self.primary.release(volume, clean=clean)
        except StillpointError:
            if volume not in self.primary.volumes:
                with contextlib.suppress(StillpointError):
                    self._serve(volume)
            raise
        mirror = await self._become_mirror(replica)
        replica.become(demoted(replica.state, clean=clean))
        mirror.enter(MirrorState.DISCONNECTED, "waits for the node that serves the volume")

    async def _become_mirror(self, replica: Replica) -> Mirror:
        record = self.primary.record(replica.volume)
        if record is None:
            raise NotFound(f"node {self.replicas.name} has lost the record of volume {replica.volume!r}")
        return await self.standby.take_over(replica, block_size=record.block_size, device_paths=record.device_paths)
