"""Pulling over a real gRPC connection: order, interruptions, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from backupnode.progress import Progress
from backupnode.puller import Puller
from backupnode.repository import PackRepository, open_directory
from backupnode.source import RetryPolicy
from backupnode.standby_client import DamagedInTransit, SnapshotName, StandbyClient
from stillpoint.config import Address
from stillpoint.devices import MemoryDevice
from stillpoint.errors import InvalidRequest, NotFound, PeerUnavailable, ProtocolError, Refused
from stillpoint.wire import chunks
from tests.conformance.test_repositories import read_all
from tests.support.standby import Fault, StandInStandby, breaks_at, damages, serving

SIZE = (10 << 20) + 4096
QUICK = RetryPolicy(attempts=3, first_delay_s=0.01, delay_s_max=0.02, interruptions_max=20)


@dataclass
class Bench:
    standby: StandInStandby
    repository: PackRepository
    client: StandbyClient
    puller: Puller
    image: bytes

    async def assert_nothing_is_left(self) -> None:
        listing = await self.repository.list()
        assert not listing.backups and not listing.damaged
        assert not list((Path(self.repository.description) / "manifests").iterdir())
        assert not self.standby.snapshots


@asynccontextmanager
async def bench(folder: Path) -> AsyncIterator[Bench]:
    device = MemoryDevice(SIZE)
    device.write(0, [random.Random(1).randbytes(3 << 20)])
    device.write((5 << 20) + 512, [random.Random(2).randbytes(2 << 20), bytes(1 << 20), b"end of data"])
    image = bytearray(SIZE)
    device.read_into(0, memoryview(image))
    standby = StandInStandby({"vol1": device})
    async with serving(standby) as address:
        repository = await open_directory(folder / "repository")
        client = StandbyClient(standby=address, export=address)
        try:
            yield Bench(standby, repository, client, Puller(client, repository, retry=QUICK), bytes(image))
        finally:
            await client.close()
            await repository.close()


def with_bench(folder: Path, body: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with bench(folder) as made:
            await body(made)

    asyncio.run(main())


def ignore(_: Progress) -> None:
    pass


def test_a_backup_equals_the_volume_and_leaves_no_snapshot(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        seen: list[Progress] = []
        record = await bench.puller.run("vol1", report=seen.append)
        assert await read_all(bench.repository, record.id) == bench.image
        assert record.origin.volume_uuid == "volume-vol1"
        assert record.received_bytes < SIZE
        assert not bench.standby.snapshots
        assert [progress.phase for progress in seen][:: len(seen) - 1] == ["snapshot", "commit"]
        done = [progress.done_bytes for progress in seen]
        assert done == sorted(done) and done[-1] == SIZE

    with_bench(tmp_path, body)


def test_a_snapshot_that_was_named_stays(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.client.create_snapshot(SnapshotName("vol1", "s1"))
        record = await bench.puller.run("vol1", snapshot="s1", report=ignore)
        assert record.origin.snapshot == "s1"
        assert list(bench.standby.snapshots) == [("vol1", "s1")]

    with_bench(tmp_path, body)


def test_a_stream_that_breaks_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.faults = [breaks_at(1), breaks_at(2), damages(1), breaks_at(0)]
        record = await bench.puller.run("vol1", report=ignore)
        assert bench.standby.stream_count == 5
        assert await read_all(bench.repository, record.id) == bench.image
        assert record.received_bytes <= SIZE

    with_bench(tmp_path, body)


@pytest.mark.parametrize(("fault", "error"), [(breaks_at(0), PeerUnavailable), (damages(0), DamagedInTransit)])
def test_a_stream_that_goes_on_breaking_fails_the_backup_and_leaves_nothing(
    tmp_path: Path, fault: Fault, error: type[Exception]
) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.faults = [breaks_at(2)] + [fault] * 10
        with pytest.raises(error, match="given up at byte 2097152 after 3 interruptions"):
            await bench.puller.run("vol1", report=ignore)
        await bench.assert_nothing_is_left()

    with_bench(tmp_path, body)


def _swap_first_two(message: bytes, index: int, held: list[bytes]) -> list[bytes]:
    if index == 0:
        held.append(message)
        return []
    return [message, held.pop()] if index == 1 else [message]


def _fault_swap() -> Fault:
    held: list[bytes] = []
    return lambda message, index: _swap_first_two(message, index, held)


@pytest.mark.parametrize(
    "fault",
    [
        _fault_swap(),
        lambda message, index: [message, message],
        lambda message, index: [] if index == 1 else [message],
        lambda message, index: [chunks.encode_hole(0, SIZE + 1)],
        lambda message, index: [chunks.encode_data(0, b"")],
        lambda message, index: [b"\xff\xff"],
    ],
    ids=["swapped", "twice", "left out", "beyond the end", "nothing", "garbage"],
)
def test_a_stream_out_of_order_is_never_stored(tmp_path: Path, fault: Fault) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.faults = [fault]
        with pytest.raises(ProtocolError):
            await bench.puller.run("vol1", report=ignore)
        await bench.assert_nothing_is_left()

    with_bench(tmp_path, body)


def test_a_stream_that_ends_early_is_taken_up_and_not_called_complete(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.faults = [lambda message, index: [message] if index < 2 else []]
        record = await bench.puller.run("vol1", report=ignore)
        assert bench.standby.stream_count == 2
        assert await read_all(bench.repository, record.id) == bench.image

    with_bench(tmp_path, body)


def test_a_snapshot_that_was_replaced_meanwhile_is_not_mixed_in(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.client.create_snapshot(SnapshotName("vol1", "s1"))

        def replace_and_break(message: bytes, index: int) -> list[bytes]:
            bench.standby.snapshots["vol1", "s1"].uuid = "another"
            raise PeerUnavailable("going away")

        bench.standby.faults = [replace_and_break]
        with pytest.raises(Refused, match="vol1@s1 was replaced"):
            await bench.puller.run("vol1", snapshot="s1", report=ignore)
        bench.standby.snapshots.clear()
        await bench.assert_nothing_is_left()

    with_bench(tmp_path, body)


def test_what_the_standby_says_reaches_the_operator(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with pytest.raises(NotFound, match="there is no volume vol2"):
            await bench.puller.run("vol2", report=ignore)
        with pytest.raises(NotFound, match="there is no snapshot vol1@s9"):
            await bench.puller.run("vol1", snapshot="s9", report=ignore)
        with pytest.raises(InvalidRequest):
            await bench.puller.run("../vol1", report=ignore)
        await bench.assert_nothing_is_left()

    with_bench(tmp_path, body)


def test_a_second_backup_of_a_volume_is_refused_while_one_runs(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.delay_s = 0.02
        first = asyncio.create_task(bench.puller.run("vol1", report=ignore))
        await asyncio.sleep(0.05)
        assert bench.puller.running == 1
        with pytest.raises(Refused, match="a backup of volume vol1 is running"):
            await bench.puller.run("vol1", report=ignore)
        await first
        await bench.puller.run("vol1", report=ignore)

    with_bench(tmp_path, body)


def test_a_backup_cancelled_at_any_time_leaves_nothing(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.standby.delay_s = 0.005
        for delay_ms in (0, 1, 2, 4, 8, 16, 32):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_ms / 1000):
                    await bench.puller.run("vol1", report=ignore)
                    pytest.fail("it was to be cancelled")
            await bench.assert_nothing_is_left()
            assert bench.puller.running == 0

    with_bench(tmp_path, body)


def test_a_snapshot_left_by_a_crash_goes_and_those_of_others_stay(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        left = f"backup-{bench.repository.uuid[:8]}-20261123T101502-3f9a"
        for name in (left, "backup-monday", "backup-00000000-20261123T101502-3f9a", "s1"):
            await bench.client.create_snapshot(SnapshotName("vol1", name))
        await bench.puller.run("vol1", report=ignore)
        assert {name for _, name in bench.standby.snapshots} == {
            "backup-monday",
            "backup-00000000-20261123T101502-3f9a",
            "s1",
        }

    with_bench(tmp_path, body)


def test_a_standby_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        nowhere = Address("127.0.0.1", 1)
        client = StandbyClient(standby=nowhere, export=nowhere)
        with pytest.raises(PeerUnavailable, match=r"standby at 127\.0\.0\.1:1 cannot be reached: connection refused"):
            await Puller(client, bench.repository, retry=QUICK).run("vol1", report=ignore)
        await client.close()
        await bench.assert_nothing_is_left()

    with_bench(tmp_path, body)
