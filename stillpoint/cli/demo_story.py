"""What the demonstration does, in order, and what it learns on the way."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import format_size
from ..errors import StillpointError
from ..nbd.client import NbdClient
from ..target import open_target
from ..wire.v1 import backup_pb2, primary_pb2, standby_pb2
from . import demo_image
from .backup_calls import run_backup
from .command import SnapshotId, VolumeSpec
from .demo_image import Image
from .demo_writer import Writer, find_instant
from .local_cluster import LocalCluster
from .nodes import Nodes
from .output import Output, format_rate, format_seconds
from .places import where_mirrored, where_snapshot
from .restore import restore_here
from .snapshot_calls import Kind, create_snapshots
from .store import create_store
from .volume import get_volume

VOLUME = "demo"
SNAPSHOT = "instant"
STORE = "demo-store"

_WRITE_SIZE = 1024 * 1024
# How long the writer runs before the snapshot, and between it and the damage.
_WRITING_S = 1.0


@dataclass(slots=True)
class Facts:
    """What the demonstration measured."""

    snapshot_create_ns: int = 0
    preserved_bytes: int = 0
    preserved_blocks: int = 0
    backup_bytes: int = 0
    backup_stored_bytes: int = 0
    backup_ns: int = 0
    primary_read_bytes: int = -1
    writes_before_snapshot: int = 0
    writes_during_backup: int = 0
    compared_bytes: int = 0

    def document(self) -> dict[str, Any]:
        seconds = self.backup_ns / 1e9
        return asdict(self) | {"backup_bytes_per_s": round(self.backup_bytes / seconds) if seconds else None}

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("snapshot create time", format_seconds(self.snapshot_create_ns / 1e9)),
            ("bytes preserved for the snapshot", format_size(self.preserved_bytes)),
            ("backup rate", format_rate(self.backup_bytes, self.backup_ns / 1e9)),
            ("bytes the backup stored", format_size(self.backup_stored_bytes)),
            ("bytes the backup read from the primary", str(self.primary_read_bytes)),
            ("writes by the volume's user during the backup", str(self.writes_during_backup)),
            ("bytes compared with the instant", format_size(self.compared_bytes)),
        ]


def volume_uri(nodes: Nodes) -> str:
    return nodes.cluster.own_nbd_uri(nodes.cluster.primary.nbd, VOLUME)


class Narrator:
    """Tells on stderr what happens, a line or two each step."""

    def __init__(self, output: Output, step_count: int) -> None:
        self.output = output
        self._step_count = step_count
        self._step_index = 0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._step_index += 1
        self.output.remark(f"[{self._step_index}/{self._step_count}] {title}")
        started = time.monotonic()
        yield
        self.tell(f"done in {format_seconds(time.monotonic() - started)}")

    def tell(self, text: str) -> None:
        self.output.remark(f"      {text}")


class Story:
    """One demonstration in one directory. `failures` says what was not as promised."""

    def __init__(self, work: Path, size: int, cluster: LocalCluster, narrator: Narrator) -> None:
        self.facts = Facts()
        self.failures: list[str] = []
        self._work = work
        self._size = size
        self._cluster = cluster
        self._narrator = narrator
        self._restored = work / "restored.img"
        # The snapshot's instant lies between these two, counted in the writer's writes.
        self._answered_before = self._begun_after = 0

    async def tell(self) -> None:
        narrator = self._narrator
        with narrator.step("Start a primary, a standby and a backup node; make a volume and its mirror"):
            await self._cluster.up([VolumeSpec(VOLUME, self._size)])
        async with self._cluster.nodes() as nodes:
            store = self._cluster.directory / "preserved.store"
            await create_store(
                nodes, STORE, kind=standby_pb2.STORE_KIND_FILE, size=self._size * 5 // 4, paths=(str(store),)
            )
            with narrator.step("Make an ext4 filesystem with real files of this machine (mke2fs -d)"):
                image = await asyncio.to_thread(
                    demo_image.make_image, self._work / "image.img", self._work / "files", self._size
                )
                narrator.tell(f"{image.file_count} files, {format_size(image.file_bytes)}")
            with narrator.step(f"Write it into the volume through NBD, at {volume_uri(nodes)}"):
                await self._fill_volume(nodes, image)
            writer = Writer(image.slots)
            backup = await self._use_volume(nodes, image, writer)
            with narrator.step("Restore the backup to a file"):
                with narrator.output.progress("      restoring", backup.size) as bar:
                    target = await open_target(str(self._restored), size=backup.size)
                    await restore_here(nodes, backup, target, bar)
        with narrator.step("Compare bit for bit, check the filesystem (e2fsck -fn), read a file back (debugfs)"):
            await asyncio.to_thread(self._prove, image, writer)

    async def _fill_volume(self, nodes: Nodes, image: Image) -> None:
        async with await NbdClient.connect(volume_uri(nodes)) as client:
            with self._narrator.output.progress("      writing", image.size) as bar, image.path.open("rb") as file:
                for start, length in demo_image.data_ranges(image.path):
                    for offset in range(start, start + length, _WRITE_SIZE):
                        file.seek(offset)
                        await client.write(offset, file.read(min(_WRITE_SIZE, start + length - offset)))
                        bar.update(offset)
                await client.flush()
                bar.update(image.size)

    async def _use_volume(self, nodes: Nodes, image: Image, writer: Writer) -> backup_pb2.Backup:
        """Snapshot, damage and backup while the writer writes."""
        stop = asyncio.Event()
        async with (
            await NbdClient.connect(volume_uri(nodes)) as writer_client,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(writer.run(writer_client, stop))
            try:
                await self._take_snapshot(nodes, writer)
                with self._narrator.step("Go on writing, and overwrite the first half of the volume with noise"):
                    await self._damage(nodes)
                    await asyncio.sleep(_WRITING_S)
                    await self._note_preserved(nodes)
                return await self._back_up(nodes, writer)
            finally:
                stop.set()

    async def _take_snapshot(self, nodes: Nodes, writer: Writer) -> None:
        narrator = self._narrator
        with narrator.step("Keep changing a file in the volume, and take a snapshot in the middle of it"):
            await asyncio.sleep(_WRITING_S)
            self._answered_before = writer.answered
            node = await where_mirrored(nodes, (VOLUME,))
            [snapshot] = await create_snapshots(node, (VOLUME,), Kind(SNAPSHOT, STORE))
            self._begun_after = writer.begun
            self.facts.snapshot_create_ns = snapshot.create_duration_ns
            narrator.tell(
                f"{VOLUME}@{SNAPSHOT} taken in {format_seconds(snapshot.create_duration_ns / 1e9)}, "
                f"after {self._answered_before} writes, and the writer never stopped"
            )

    async def _damage(self, nodes: Nodes) -> None:
        noise = random.Random(1)
        half = self._size // 2
        async with await NbdClient.connect(volume_uri(nodes)) as client:
            with self._narrator.output.progress("      overwriting", half) as bar:
                for offset in range(0, half, _WRITE_SIZE):
                    await client.write(offset, noise.randbytes(_WRITE_SIZE))
                    bar.update(offset + _WRITE_SIZE)
                await client.flush()

    async def _note_preserved(self, nodes: Nodes) -> None:
        _, snapshot = await where_snapshot(nodes, SnapshotId(VOLUME, SNAPSHOT))
        self.facts.preserved_bytes = snapshot.preserved_bytes
        self.facts.preserved_blocks = snapshot.preserved_blocks
        if snapshot.state != standby_pb2.SNAPSHOT_STATE_ACTIVE:
            raise StillpointError(f"the snapshot {VOLUME}@{SNAPSHOT} is not active: {snapshot.reason}")
        self._narrator.tell(f"{format_size(snapshot.preserved_bytes)} of old blocks preserved on the standby")

    async def _back_up(self, nodes: Nodes, writer: Writer) -> backup_pb2.Backup:
        narrator = self._narrator
        with narrator.step("Back the snapshot up: the backup node pulls it from the standby, the writer goes on"):
            before = await get_volume(nodes, VOLUME)
            written = writer.answered
            started = time.monotonic_ns()
            with narrator.output.progress("      backing up", self._size) as bar:
                backup = await run_backup(nodes, VOLUME, snapshot=SNAPSHOT, bar=bar)
            self.facts.backup_ns = backup.duration_ns or time.monotonic_ns() - started
            self.facts.writes_during_backup = writer.answered - written
            after = await get_volume(nodes, VOLUME)
            self.facts.primary_read_bytes = after.read_bytes - before.read_bytes
            self.facts.backup_bytes = backup.data_bytes
            self.facts.backup_stored_bytes = backup.stored_bytes
            if self.facts.primary_read_bytes:
                self.failures.append(f"the backup read {self.facts.primary_read_bytes} bytes from the primary")
            if after.pair.state != primary_pb2.PAIR_STATE_IN_SYNC:
                self.failures.append(f"the pair fell out of sync: {after.pair.detail}")
            return backup

    def _prove(self, image: Image, writer: Writer) -> None:
        """Compare the restored image with what the volume held at the snapshot's instant."""
        self._check_instant(image, writer)
        trouble = demo_image.check_filesystem(self._restored)
        self._note("the restored filesystem is clean (e2fsck -fn)", trouble)
        same = demo_image.read_back(image, self._restored, self._work / "read-back")
        self._note(
            f"/{image.shown_file}, read back from it, equals this machine's own file",
            None
            if same
            else f"/{image.shown_file} read back from the restored image differs from {image.shown_source}",
        )

    def _check_instant(self, image: Image, writer: Writer) -> None:
        shown = find_instant(self._restored, image.slots)
        self.facts.writes_before_snapshot = shown
        if not self._answered_before <= shown <= self._begun_after:
            self.failures.append(
                f"the snapshot shows write {shown}, but {self._answered_before} were answered before it was asked for "
                f"and {self._begun_after} begun when it was there"
            )
            return
        # The image becomes what the volume held then: the files, and the first `shown` writes.
        writer.apply(image.path, shown)
        difference = demo_image.first_difference(image.path, self._restored)
        self.facts.compared_bytes = self._size
        self._note(
            f"the restored image equals the volume as it was after write {shown}, in all {format_size(self._size)}",
            None if difference is None else f"the restored image differs from the instant at byte {difference}",
        )

    def _note(self, promise: str, trouble: str | None) -> None:
        if trouble is None:
            self._narrator.tell(promise)
        else:
            self.failures.append(trouble)
