"""`python -m primary --config FILE.yaml`: the primary's process."""

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
from .config import PrimaryConfig
from .node import PrimaryNode
from .service import SERVICE_NAME, PrimaryService

logger = logging.getLogger(__name__)


async def serve(config: PrimaryConfig, stop: asyncio.Event) -> None:
    """Until `stop` is set."""
    lock = lock_state_dir(config.state_dir)
    try:
        credentials = open_credentials(config.tls)
        node = PrimaryNode(config, credentials)
        await node.start()
        grpc_server = None
        try:
            service = PrimaryService(node)
            grpc_server = await serve_grpc(config.listen.grpc, service.add_to, [SERVICE_NAME], credentials)
            logger.info("serving", extra={"grpc": grpc_server.address, "nbd": node.nbd_address})
            await attend(
                stop,
                grpc_server,
                role="primary",
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
        "primary",
        PrimaryConfig,
        serve,
        description="Export block volumes over NBD and mirror every write to a standby.",
    )


if __name__ == "__main__":
    sys.exit(main())
