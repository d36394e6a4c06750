"""`python -m stillpoint.cli.health [--tls FOLDER] HOST:PORT`: exit 0 when the node there serves; else a line and 1.

What a container's health check runs, so it loads nothing but gRPC's own health service. FOLDER holds certificates; the
node's own will do.
"""

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..errors import ConfigError
from ..tls import Credentials

TIMEOUT_S = 3.0


def what_is_wrong(address: str, certificates: Path | None = None, *, timeout_s: float = TIMEOUT_S) -> str | None:
    """One line saying why the node at `address` does not serve, or None when it does."""
    try:
        channel = _channel(address, certificates)
    except ConfigError as error:
        return str(error)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{address} gives no health answer: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address} says {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def _channel(address: str, certificates: Path | None) -> grpc.Channel:
    if certificates is None:
        return grpc.insecure_channel(address)
    files = Credentials(certificates).files
    identity = grpc.ssl_channel_credentials(files.authority, files.key, files.certificate)
    return grpc.secure_channel(address, identity)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stillpoint.cli.health", description="Ask a node whether it serves."
    )
    parser.add_argument("--tls", type=Path, metavar="FOLDER", help="our certificates; the node's own will do")
    parser.add_argument("address", metavar="HOST:PORT")
    options = parser.parse_args()
    wrong = what_is_wrong(options.address, options.tls)
    if wrong is not None:
        print(wrong, file=sys.stderr)
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
