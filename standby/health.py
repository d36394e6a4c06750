"""Whether the mirrors are really kept: each disk is read and flushed. That a primary is connected is not asked."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping

from stillpoint.canary import PROBE_SIZE, Probe, probe_offset
from stillpoint.errors import StillpointError

from .mirror import Mirror, MirrorState
from .node import StandbyNode


def probes(node: StandbyNode) -> Mapping[str, Probe]:
    return {name: functools.partial(_probe, mirror) for name, mirror in node.mirrors.items()}


async def _probe(mirror: Mirror) -> None:
    if mirror.state is MirrorState.FAILED:
        raise StillpointError(f"the mirror of {mirror.record.volume} has failed: {mirror.detail}")
    loop, device = asyncio.get_running_loop(), mirror.device
    buffer = memoryview(bytearray(min(PROBE_SIZE, device.size)))
    await loop.run_in_executor(mirror.executor, device.read_into, probe_offset(device.size), buffer)
    await loop.run_in_executor(mirror.executor, device.flush)
