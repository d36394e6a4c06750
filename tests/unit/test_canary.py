"""Health follows the data path: a disk that hangs or fails makes its volume unwell, and only then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stillpoint.canary import Canary, Probe
from stillpoint.devices import MemoryDevice
from stillpoint.errors import DeviceError
from stillpoint.nbd.export import DeviceExport
from tests.support.devices import PassingDevice


class Told:
    """What the health service was told last."""

    def __init__(self) -> None:
        self.services: dict[str, bool] = {}

    async def set_serving(self, service: str, serving: bool) -> None:
        self.services[service] = serving


class HangingDevice(PassingDevice):
    """Its flush waits until it is let go."""

    def __init__(self) -> None:
        super().__init__(MemoryDevice(1 << 20))
        self.works = threading.Event()
        self.works.set()
        self.flush_count = 0

    def flush(self) -> None:
        self.flush_count += 1
        self.works.wait()
        super().flush()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


class Replies:
    def __init__(self) -> None:
        self.result: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def reply(self, cookie: int, errno: int) -> None:
        self.result.set_result(errno)


def flushing(export: DeviceExport) -> Probe:
    async def probe() -> None:
        waiter = Replies()
        export.flush(waiter, 0)
        if errno := await waiter.result:
            raise DeviceError("the flush failed", errno)

    return probe


def test_a_disk_that_hangs_makes_its_volume_unwell_and_no_other_and_it_recovers() -> None:
    async def main() -> None:
        told, device = Told(), HangingDevice()
        with ThreadPoolExecutor(2) as executor:
            probes = {
                "slow": flushing(DeviceExport("slow", device, executor)),
                "fine": flushing(DeviceExport("fine", MemoryDevice(1 << 20), executor)),
            }
            canary = Canary(told, lambda: probes, deadline_s=0.1)
            await canary.look()
            assert told.services == {"": True, "volume/slow": True, "volume/fine": True}
            device.works.clear()
            await canary.look()
            assert told.services == {"": False, "volume/slow": False, "volume/fine": True}
            assert "0.1 s" in canary.wrong["slow"]
            before = device.flush_count
            for _ in range(5):
                await canary.look()
            assert device.flush_count == before, "probes pile up behind a disk that hangs"
            device.works.set()
            await asyncio.sleep(0.05)
            await canary.look()
            assert told.services == {"": True, "volume/slow": True, "volume/fine": True}

    run(main)


@pytest.mark.parametrize("error", [DeviceError("EIO", 5), ValueError("a bug")])
def test_a_probe_that_fails_is_unwell_whatever_it_raises(error: Exception) -> None:
    async def main() -> None:
        async def probe() -> None:
            raise error

        told = Told()
        await Canary(told, lambda: {"vol1": probe}).look()
        assert told.services == {"": False, "volume/vol1": False}

    run(main)


def test_a_volume_that_is_gone_is_forgotten() -> None:
    async def main() -> None:
        async def fail() -> None:
            raise DeviceError("EIO", 5)

        probes: dict[str, Probe] = {"vol1": fail}
        told = Told()
        canary = Canary(told, lambda: probes)
        await canary.look()
        probes.clear()
        await canary.look()
        assert told.services == {"": True, "volume/vol1": False}
        assert not canary.wrong

    run(main)


def test_a_node_without_volumes_is_well() -> None:
    async def main() -> None:
        told = Told()
        await Canary(told, dict).look()
        assert told.services == {"": True}

    run(main)
