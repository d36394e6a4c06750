"""What every node does beside its work while it serves: metrics, health from the data path, the service manager."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from .canary import Health, Probe, watching
from .config import Address
from .metrics import Gather, serving
from .service_manager import serve_until
from .tls import Credentials


async def attend(
    stop: asyncio.Event,
    health: Health,
    *,
    role: str,
    node: str,
    metrics: Address,
    gather: Gather,
    probes: Callable[[], Mapping[str, Probe]],
    credentials: Credentials | None,
) -> None:
    """Until `stop` is set.

    role: primary, standby or backup. node: its configured name. metrics: where to serve them.
    """
    async with serving(metrics, gather, role=role, node=node, credentials=credentials), watching(health, probes):
        await serve_until(stop, status=f"{role} {node} is serving")
