"""The standby's end of a session, with a real engine behind it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from standby import receiver as receiver_module
from standby.cow import preserver
from standby.receiver import MirrorReceiver
from stillpoint.channel import Buffer
from stillpoint.link.frames import WRITE, encode_header
from tests.support.cow import KIB, MIB, Rig, run
from tests.support.executors import HeldExecutor

_EPOCH, _SESSION = 1, 1


class OneWayLink:
    """Takes what is sent, and remembers whether it was asked to pause."""

    pending_bytes = 0
    congested = False
    is_closed = False
    receiver: Any = None

    def __init__(self) -> None:
        self.is_paused = False
        self.sent_count = 0

    def send(self, *buffers: Buffer) -> None:
        self.sent_count += 1

    send_owned = send

    def flush(self) -> None: ...

    def poll(self, limit_s: float) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def close(self) -> None: ...

    def abort(self, error: Exception | None = None) -> None: ...


def _receiver(rig: Rig, link: OneWayLink) -> MirrorReceiver:
    replica = SimpleNamespace(state=SimpleNamespace(has=lambda flag: False))
    mirror: Any = SimpleNamespace(
        engine=rig.engine, device=rig.mirror, executor=None, replica=replica, received_bytes=0, receiver=None
    )
    return MirrorReceiver(mirror, link, epoch=_EPOCH, session=_SESSION)


def _write(receiver: MirrorReceiver, offset: int, payload: bytes) -> None:
    header = encode_header(WRITE, 0, _EPOCH, _SESSION, receiver.sequence + 1, offset, len(payload), payload)
    frame = memoryview(header + payload)
    assert receiver.received(frame) == len(frame)


async def _until_committed(rig: Rig) -> None:
    async with asyncio.timeout(10):
        while rig.engine.staged_bytes:
            await asyncio.sleep(0.005)


def test_a_commit_begins_early_and_the_link_is_paused_only_at_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver_module, "_STAGE_S", 60.0)  # no commit is to be due to time

    async def main() -> None:
        executor = HeldExecutor(preserver.carry_out.__qualname__)
        rig = Rig(tmp_path, executor=executor, stage_size_max=256 * KIB)
        link = OneWayLink()
        receiver = _receiver(rig, link)
        await rig.snapshot("s")
        executor.may_go.clear()
        written = 0
        while not rig.engine.wants_commit:
            assert not link.is_paused
            if rig.engine.staged_bytes > 128 * KIB:
                await asyncio.wait_for(executor.hold(), 10)
            _write(receiver, written, b"new!" * KIB)
            written += 4 * KIB
        assert link.is_paused
        executor.may_go.set()
        async with asyncio.timeout(10):
            while link.is_paused:
                await asyncio.sleep(0.005)
        await rig.engine.commit()
        assert rig.mirror_path.read_bytes() == b"new!" * (written // 4) + bytes(rig.size - written)
        assert rig.image("s") == bytes(rig.size)
        await rig.close()

    run(main)


def test_what_is_staged_during_a_commit_is_committed_though_nothing_more_comes(tmp_path: Path) -> None:
    async def main() -> None:
        executor = HeldExecutor(preserver.carry_out.__qualname__)
        rig = Rig(tmp_path, executor=executor, stage_size_max=MIB)
        receiver = _receiver(rig, OneWayLink())
        await rig.snapshot("s")
        executor.may_go.clear()
        for block in range(MIB // 16 // (4 * KIB)):
            _write(receiver, block * 4 * KIB, b"early" * 100)
        await executor.hold()
        _write(receiver, 512 * KIB, b"late")
        await asyncio.sleep(0.2)  # the timer of the stage comes and goes
        executor.may_go.set()
        await _until_committed(rig)
        assert rig.mirror_path.read_bytes()[512 * KIB :][:4] == b"late"
        await rig.close()

    run(main)
