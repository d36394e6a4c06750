"""Prometheus metrics of one node: gathered when they are asked for, served over HTTP at /metrics.

Nothing here runs between two scrapes. The node's own counters are read on its loop, so they fit together.
A node keeps disks safe with or without metrics: a port that is taken costs a warning, not the start.

Names follow Prometheus: base units in the name (`_bytes`, `_seconds`), counters end in `_total`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from . import __version__
from .config import Address
from .errors import StillpointError
from .nbd.listen import listen_tcp
from .nbd.server import NbdServer
from .tls import Credentials
from .traffic import LATENCY_BOUNDS_S, Latency, Traffic

logger = logging.getLogger(__name__)

PREFIX: Final = "stillpoint_"

# A scraper is one client or a few; more is a mistake or worse.
_CONNECTION_MAX: Final = 16
_REQUEST_SIZE_MAX: Final = 8192
_TIMEOUT_S: Final = 10.0
_BUCKETS: Final = (*(f"{bound:g}" for bound in LATENCY_BOUNDS_S), "+Inf")


class Families:
    """The samples of one scrape. A metric's help and label names are those of its first sample."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def gauge(self, name: str, text: str, value: float, **labels: str) -> None:
        family = self._family(GaugeMetricFamily, name, text, labels)
        assert isinstance(family, GaugeMetricFamily)
        family.add_metric(list(labels.values()), value)

    def counter(self, name: str, text: str, value: float, **labels: str) -> None:
        """name: without the `_total` that every counter ends in."""
        family = self._family(CounterMetricFamily, name, text, labels)
        assert isinstance(family, CounterMetricFamily)
        family.add_metric(list(labels.values()), value)

    def latency(self, name: str, text: str, latency: Latency, **labels: str) -> None:
        family = self._family(HistogramMetricFamily, name, text, labels)
        assert isinstance(family, HistogramMetricFamily)
        total, buckets = 0, []
        for bound, count in zip(_BUCKETS, latency.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(list(labels.values()), buckets, latency.sum_s)

    def state(self, name: str, text: str, current: str, known: Iterable[str], **labels: str) -> None:
        """One sample for each state there is, 1 for the present one."""
        for state in known:
            self.gauge(name, text, state == current, **labels, state=state)

    def traffic(self, traffic: Traffic, **labels: str) -> None:
        """What went over one export, or over several that share their labels and were summed."""
        text = "NBD requests that were begun."
        for operation, count in (
            ("read", traffic.read_count),
            ("write", traffic.write_count),
            ("flush", traffic.flush_count),
            ("trim", traffic.trim_count),
            ("zero", traffic.zero_count),
        ):
            self.counter("nbd_requests", text, count, **labels, operation=operation)
        text = "Bytes read and written by NBD clients."
        self.counter("nbd_bytes", text, traffic.read_bytes, **labels, operation="read")
        self.counter("nbd_bytes", text, traffic.written_bytes, **labels, operation="write")
        self.counter("nbd_errors", "NBD requests answered with an error.", traffic.error_count, **labels)
        text = "Time from a request's arrival to its answer."
        self.latency("nbd_request_seconds", text, traffic.read_latency, **labels, operation="read")
        self.latency("nbd_request_seconds", text, traffic.write_latency, **labels, operation="write")
        self.latency("nbd_request_seconds", text, traffic.flush_latency, **labels, operation="flush")

    def nbd_server(self, server: Mapping[str, int], *, exports: str) -> None:
        """server: `nbd_statistics`. exports: what it serves, "volumes", "snapshots" or "backups"."""
        text = "NBD connections open, handshakes included."
        self.gauge("nbd_connections", text, server["connections"], exports=exports)
        self.gauge("nbd_connections_max", "NBD connections allowed.", server["connections_max"], exports=exports)
        text = "NBD connections that were refused or ended for what the client did."
        self.counter("nbd_connections_refused", text, server["refused"], exports=exports)
        self.gauge("request_memory_bytes", "Memory that NBD requests hold.", server["memory"], exports=exports)
        text = "Memory that NBD requests may hold together."
        self.gauge("request_memory_bytes_max", text, server["memory_max"], exports=exports)

    def all(self) -> list[Metric]:
        return list(self._families.values())

    def _family(self, kind: type[Metric], name: str, text: str, labels: Mapping[str, str]) -> Metric:
        family = self._families.get(name)
        if family is None:
            family = kind(PREFIX + name, text, labels=list(labels))  # type: ignore[call-arg]
            self._families[name] = family
        return family


def nbd_statistics(server: NbdServer) -> dict[str, int]:
    """Can be written as JSON, for a server in another process of the node."""
    return {
        "connections": server.connection_count,
        "connections_max": server.connection_max,
        "refused": server.refused_count,
        "memory": server.budget.limit - server.budget.free,
        "memory_max": server.budget.limit,
    }


Gather = Callable[[Families], Awaitable[None]]


class _Latest(Collector):
    """Shows the registry what was gathered a moment ago."""

    def __init__(self) -> None:
        self.metrics: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        return self.metrics


class MetricsServer:
    """Answers GET /metrics, one gathering at a time."""

    def __init__(self, gather: Gather, *, role: str, node: str, credentials: Credentials | None = None) -> None:
        """role: primary, standby or backup. node: its configured name."""
        self._gather = gather
        self._credentials = credentials
        self._build = {"role": role, "node": node, "version": __version__, "python": platform.python_version()}
        self._latest = _Latest()
        self._registry = CollectorRegistry()
        self._registry.register(self._latest)
        ProcessCollector(registry=self._registry)
        self._turn = asyncio.Lock()
        self._open: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, address: Address) -> Address:
        """Listen; returns the address with its real port. Raises what `listen_tcp` raises."""
        listener = listen_tcp(address.host, address.port)
        self._server = await asyncio.start_server(self._connected, sock=listener, limit=_REQUEST_SIZE_MAX)
        return Address(address.host, listener.getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
            await self._server.wait_closed()

    async def render(self) -> bytes:
        async with self._turn:
            families = Families()
            families.gauge("build_info", "1, and which build this is.", 1, **self._build)
            if self._credentials is not None:
                text = "When this node's certificate expires, Unix time."
                expires = self._credentials.not_after.timestamp()
                families.gauge("certificate_expiry_timestamp_seconds", text, expires)
            await self._gather(families)
            self._latest.metrics = families.all()
            return generate_latest(self._registry)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= _CONNECTION_MAX:
            logger.warning("a metrics connection was refused: %d are open", len(self._open))
            writer.transport.abort()
            return
        self._open.add(task)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(head))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # a client that is gone, too slow or too loud; it loses its own connection and nothing else
        finally:
            self._open.discard(task)
            writer.transport.abort()

    async def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"this is HTTP/1\n")
        if words[0] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"ask with GET\n")
        if words[1].partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"the metrics are at /metrics\n")
        try:
            body = await self.render()
        except Exception:  # whatever is wrong with the metrics stays with them
            logger.exception("metrics could not be gathered")
            return _response("500 Internal Server Error", b"see the node's log\n")
        return _response("200 OK", body, kind=CONTENT_TYPE_LATEST, without_body=words[0] == b"HEAD")


def _response(
    status: str, body: bytes, *, kind: str = "text/plain; charset=utf-8", without_body: bool = False
) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (b"" if without_body else body)


@contextlib.asynccontextmanager
async def serving(
    address: Address, gather: Gather, *, role: str, node: str, credentials: Credentials | None = None
) -> AsyncIterator[Address | None]:
    """Serve metrics while the body runs; yields where, or None when the port cannot be had."""
    server = MetricsServer(gather, role=role, node=node, credentials=credentials)
    bound: Address | None = None
    try:
        bound = await server.start(address)
    except StillpointError as error:
        logger.warning("metrics are not served: %s", error)
    try:
        yield bound
    finally:
        await server.stop()
