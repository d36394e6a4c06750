"""`python -m standby --config FILE.yaml`: the standby's main process."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys

from stillpoint.attend import attend
from stillpoint.runtime import lock_state_dir, run_node, serve_grpc
from stillpoint.tls import open_credentials

from . import health, metrics
from .config import StandbyConfig
from .node import StandbyNode
from .service import SERVICE_NAME, StandbyService

logger = logging.getLogger(__name__)


async def serve(config: StandbyConfig, stop: asyncio.Event) -> None:
    """Until `stop` is set."""
    lock = lock_state_dir(config.state_dir)
    try:
        credentials = open_credentials(config.tls)
        node = StandbyNode(config, credentials)
        grpc_server = None
        try:
            await node.start()
            service = StandbyService(node)
            grpc_server = await serve_grpc(config.listen.grpc, service.add_to, [SERVICE_NAME], credentials)
            logger.info("serving", extra={"grpc": grpc_server.address, "data_link_port": node.data_link_port})
            await attend(
                stop,
                grpc_server,
                role="standby",
                node=config.node,
                metrics=config.listen.metrics,
                gather=functools.partial(metrics.gather, node),
                probes=functools.partial(health.probes, node),
                credentials=credentials,
            )
            logger.info("stopping")
        finally:
            if grpc_server is not None:
                await grpc_server.stop()
            await node.stop()
    finally:
        os.close(lock)


def main() -> int:
    return run_node(
        "standby",
        StandbyConfig,
        serve,
        description="Hold the mirrors of a primary's volumes, and take and export snapshots of them.",
    )


if __name__ == "__main__":
    sys.exit(main())
