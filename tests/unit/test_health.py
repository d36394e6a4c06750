"""The health probe against a real gRPC server."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def _node(status: int) -> Iterator[str]:
    servicer = health.HealthServicer()
    servicer.set("", status)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


def _probe(address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stillpoint.cli.health", address]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_serving_node_is_healthy() -> None:
    with _node(SERVING) as address:
        run = _probe(address)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_node_that_does_not_serve_is_unhealthy_in_one_line() -> None:
    with _node(NOT_SERVING) as address:
        run = _probe(address)
    assert run.returncode == 1
    assert run.stderr == f"{address} says NOT_SERVING\n"


def test_a_node_that_is_not_there_is_unhealthy_in_one_line() -> None:
    run = _probe("127.0.0.1:1")
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "127.0.0.1:1 gives no health answer" in run.stderr
