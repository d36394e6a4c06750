"""`python -m stillpoint.cli.health HOST:PORT`: exit 0 when the node there says it is serving, else one line and exit 1.

What a container's health check runs, so it loads nothing but gRPC's own health service.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0


def what_is_wrong(address: str, *, timeout_s: float = TIMEOUT_S) -> str | None:
    """One line saying why the node at `address` does not serve, or None when it does."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{address} gives no health answer: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address} says {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m stillpoint.cli.health HOST:PORT", file=sys.stderr)
        return 2
    wrong = what_is_wrong(sys.argv[1])
    if wrong is not None:
        print(wrong, file=sys.stderr)
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
