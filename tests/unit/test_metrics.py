"""The metrics server: what it answers, and that nobody who asks it badly costs the node anything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stillpoint.config import Address
from stillpoint.metrics import Families, MetricsServer, serving
from stillpoint.traffic import LATENCY_BOUNDS_S, Latency, Traffic

LOOPBACK = Address("127.0.0.1", 0)


async def gather(families: Families) -> None:
    families.gauge("answer", "The answer.", 42, volume="vol1")


async def ask(address: Address, request: bytes) -> bytes:
    """All that the server says until it closes."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    with contextlib.closing(writer):
        writer.write(request)
        return await reader.read()


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[Address]:
    async with serving(LOOPBACK, gather, role="primary", node="n1") as address:
        assert address is not None
        yield address


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK"),
        (b"GET /metrics?name=a HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200 OK"),
        (b"GET /other HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"nonsense\r\n\r\n", b"400 Bad Request"),
    ],
)
def test_each_request_has_its_status(request_head: bytes, status: bytes) -> None:
    async def run() -> None:
        async with server() as address:
            answer = await ask(address, request_head)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
            length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
            assert len(body) == (0 if request_head.startswith(b"HEAD") else length)

    asyncio.run(run())


def test_a_scrape_shows_what_was_gathered_and_which_build_this_is() -> None:
    async def run() -> None:
        async with server() as address:
            answer = await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        families = {f.name: f for f in text_string_to_metric_families(answer.partition(b"\r\n\r\n")[2].decode())}
        (sample,) = families["stillpoint_answer"].samples
        assert (sample.labels, sample.value) == ({"volume": "vol1"}, 42)
        (build,) = families["stillpoint_build_info"].samples
        assert (build.labels["role"], build.labels["node"]) == ("primary", "n1")
        assert families["process_resident_memory_bytes"].samples[0].value > 1 << 20

    asyncio.run(run())


def test_clients_that_never_finish_their_request_are_capped_and_let_others_in_once_gone() -> None:
    async def run() -> None:
        async with server() as address:
            slow = [socket.create_connection((address.host, address.port)) for _ in range(40)]
            for sock in slow:
                sock.send(b"GET /met")
            with contextlib.suppress(ConnectionError):
                assert await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
            for sock in slow:
                sock.close()
            await asyncio.sleep(0.05)
            assert b"stillpoint_answer" in await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")

    asyncio.run(run())


def test_a_request_without_end_is_cut_off() -> None:
    async def run() -> None:
        async with server() as address:
            with contextlib.suppress(ConnectionError):
                assert await ask(address, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000) == b""
            assert b"stillpoint_answer" in await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")

    asyncio.run(run())


def test_a_failed_gathering_is_an_error_to_the_scraper_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(families: Families) -> None:
        raise OSError("the disk of the counters is gone")

    async def run() -> None:
        async with serving(LOOPBACK, fail, role="primary", node="n1") as address:
            assert address is not None
            answer = await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert b" 500 " in answer and b"gone" not in answer

    asyncio.run(run())
    assert "the disk of the counters is gone" in caplog.text


def test_a_port_that_is_taken_costs_a_warning_and_not_the_node(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            async with serving(Address("127.0.0.1", port), gather, role="primary", node="n1") as address:
                assert address is None

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert "metrics are not served" in caplog.text


def test_histograms_are_cumulative_and_hold_every_request() -> None:
    async def gather_latency(families: Families) -> None:
        families.latency("wait_seconds", "Waiting.", latency)

    latency = Latency()
    for duration_s, count in ((10e-6, 5), (LATENCY_BOUNDS_S[3], 2), (LATENCY_BOUNDS_S[3] * 1.01, 1), (1000.0, 4)):
        latency.observe(duration_s, count)

    async def run() -> str:
        return (await MetricsServer(gather_latency, role="primary", node="n").render()).decode()

    family = next(f for f in text_string_to_metric_families(asyncio.run(run())) if f.name == "stillpoint_wait_seconds")
    buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
    assert buckets[:5] == [5, 5, 5, 7, 8]
    assert buckets[-2:] == [8, 12]
    values = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples}
    assert values["count"] == 12
    assert values["sum"] == pytest.approx(4000, rel=0.001)


def test_traffic_survives_the_way_between_two_processes() -> None:
    traffic, twice = Traffic(), Traffic()
    traffic.read_count, traffic.written_bytes, traffic.error_count = 3, 4096, 1
    traffic.write_latency.observe(0.2, 7)
    twice.add(traffic)
    twice.add(Traffic.from_document(traffic.document()))
    assert (twice.read_count, twice.written_bytes, twice.error_count) == (6, 8192, 2)
    assert sum(twice.write_latency.counts) == 14 and twice.write_latency.sum_s == pytest.approx(2.8)
