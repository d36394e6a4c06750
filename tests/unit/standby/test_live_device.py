"""The mirror as the volume of a promoted node: reads see staged writes, snapshots stay, flushes come from threads."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from standby.live_device import LiveDevice
from stillpoint.errors import OutOfRange
from tests.support.cow import KIB, MIB, Rig, read

SIZE = MIB


def test_random_changes_over_a_snapshot_read_back_and_the_snapshot_stays(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def scenario() -> None:
        with ThreadPoolExecutor(2) as engine_threads, ThreadPoolExecutor(2) as threads:
            rig = Rig(tmp_path, size=SIZE, executor=engine_threads, stage_size_max=256 * KIB)
            device = LiveDevice(rig.engine, rig.mirror, rig.engine.resize)
            loop = asyncio.get_running_loop()
            model = bytearray(SIZE)
            images: dict[str, bytes] = {}
            for step in range(600):
                offset = rng.randrange(SIZE)
                length = min(rng.choice((512, 4 * KIB, 5000, 70 * KIB)), SIZE - offset)
                kind = rng.random()
                if kind < 0.5:
                    data = rng.randbytes(length)
                    device.write(offset, (data[: length // 2], data[length // 2 :]))
                    model[offset : offset + length] = data
                elif kind < 0.6:
                    device.trim(offset, length)
                    model[offset : offset + length] = bytes(length)
                elif kind < 0.7:
                    device.write_zeroes(offset, length, may_trim=False)
                    model[offset : offset + length] = bytes(length)
                elif kind < 0.73:
                    await loop.run_in_executor(threads, device.flush)
                elif kind < 0.75 and len(images) < 4:
                    await rig.snapshot(f"s{step}")
                    images[f"s{step}"] = bytes(model)
                else:
                    buffer = bytearray(length)
                    expected = bytes(model[offset : offset + length])
                    if rng.random() < 0.5 or not device.try_read_into(offset, memoryview(buffer)):
                        await loop.run_in_executor(threads, device.read_into, offset, memoryview(buffer))
                    assert buffer == expected
                if rng.random() < 0.1:
                    await asyncio.sleep(rng.random() * 0.01)
                if device.congested:
                    await loop.run_in_executor(threads, device.flush)
            await loop.run_in_executor(threads, device.flush)
            device.close()
            assert read(rig.mirror, 0, SIZE) == model
            for name, image in images.items():
                assert rig.image(name) == image
            await rig.close()

    asyncio.run(scenario())


def test_a_read_in_a_thread_never_misses_what_was_written_before_it_began(tmp_path: Path) -> None:
    """While commits move the staged blocks to the mirror under the readers."""

    async def scenario() -> None:
        with ThreadPoolExecutor(1) as engine_threads, ThreadPoolExecutor(4) as threads:
            rig = Rig(tmp_path, size=SIZE, executor=engine_threads)
            device = LiveDevice(rig.engine, rig.mirror, rig.engine.resize)
            loop = asyncio.get_running_loop()
            for round_number in range(1, 60):
                await rig.snapshot(f"s{round_number}")
                for block in range(8):
                    device.write(block * 4 * KIB, (bytes([round_number]) * 4 * KIB,))
                committing = asyncio.create_task(rig.engine.commit())

                def look() -> bytes:
                    buffer = bytearray(32 * KIB)
                    device.read_into(0, memoryview(buffer))
                    return bytes(buffer)

                for found in await asyncio.gather(*(loop.run_in_executor(threads, look) for _ in range(8))):
                    assert found == bytes([round_number]) * 32 * KIB
                await committing
            device.close()
            await rig.close()

    asyncio.run(scenario())


def test_staged_data_in_a_hole_of_the_mirror_is_reported_as_data(tmp_path: Path) -> None:
    async def scenario() -> None:
        rig = Rig(tmp_path, size=SIZE)
        device = LiveDevice(rig.engine, rig.mirror, rig.engine.resize)
        assert all(extent.hole for extent in device.extents(0, SIZE))
        await rig.snapshot("before")
        device.write(0, (b"x" * 512,))
        assert rig.engine.staged_bytes
        assert not any(extent.hole for extent in device.extents(0, 4 * KIB))
        with pytest.raises(OutOfRange):
            device.write(SIZE - 1, (b"xx",))
        device.close()
        await rig.close()

    asyncio.run(scenario())
