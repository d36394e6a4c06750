"""Thousands of hostile connections to a running cluster: it serves its other clients all the while, and forgets them.

Without TLS, so that what is said gets to the parsers; with it, most of this ends at the handshake.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import yaml

from stillpoint.config import Address
from stillpoint.link.frames import FrameType, encode_header
from stillpoint.nbd import codec
from stillpoint.nbd import constants as c
from tests.fuzz.exchanges import client_handshakes, data_link_frames, repaired_frames, requests
from tests.fuzz.listeners import MirrorOfOurs, call_badly, calls, listen_badly, recorded_grpc_calls, say
from tests.fuzz.mutation import Mutator, fuzz_seed, scaled
from tests.support.cluster import LocalCluster
from tests.support.nbd import RawClient
from tests.support.processes import Footprint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MIB = 1 << 20
OUR_TRACEBACK = re.compile(r'File "[^"]*/(stillpoint|primary|standby|backupnode)/|unexpectedly')


class Witness:
    """A client that writes and reads back, without a pause, while others misbehave."""

    def __init__(self, port: int) -> None:
        self.count = 0
        self.longest_s = 0.0
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._client = RawClient(port, timeout_s=30).go("witness")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        randomness = random.Random(1)
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                offset, data = randomness.randrange(200) * 4096, randomness.randbytes(4096)
                assert self._client.ask(c.Command.WRITE, offset, 4096, payload=data) == 0
                cookie = self._client.request(c.Command.READ, offset, 4096)
                assert self._client.reply() == (cookie, 0, data)
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.count += 1
        except Exception as error:  # noqa: BLE001 - whatever it was, `end` tells
            self.failure = error

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        self._client.socket.close()
        assert self.failure is None, self.failure
        assert self.count > 10 and self.longest_s < 10, (self.count, self.longest_s)


class Target:
    """A cluster, its addresses, and what it holds before anybody misbehaves."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        listen = {
            node: yaml.safe_load((cluster.directory / f"{node}.yaml").read_text())["listen"]
            for node in ("primary", "standby", "backup")
        }
        self.addresses = {
            (node, name): Address.parse(text) for node, names in listen.items() for name, text in names.items()
        }
        self.randomness = random.Random(fuzz_seed())

    def __getitem__(self, key: tuple[str, str]) -> Address:
        return self.addresses[key]

    def pids(self) -> dict[str, int]:
        env = self.cluster.env
        return {
            "primary": env["primary"]["pid"],
            "standby": env["standby"]["pid"],
            "export": env["standby"]["export_pid"],
            "backup": env["backup"]["pid"],
        }


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory = tmp_path_factory.mktemp("fuzz") / "cluster"
    with LocalCluster.up(directory, "witness:1MiB", "vol1:1MiB", insecure=True) as cluster:
        cluster.cli("snapshot", "create", "vol1", "--name", "s1")
        yield Target(cluster)


@pytest.fixture(autouse=True)
def nobody_else_is_harmed(target: Target) -> Iterator[None]:
    pids = target.pids()
    # What is imported and allocated at the first use of anything is not a leak.
    asyncio.run(listen_badly(target["primary", "nbd"], client_handshakes(), 50, random.Random(1)))
    before = [Footprint.of(name, pid) for name, pid in pids.items()]
    witness = Witness(target["primary", "nbd"].port)
    try:
        yield
    finally:
        witness.end()
    assert target.pids() == pids, "a process ended"
    for footprint in before:
        # The allocator keeps the buffers of as many connections as there were at once: at most 32, of 3 MiB each.
        footprint.assert_back(growth_bytes=112 * MIB)
    for log in (target.cluster.directory / "logs").glob("*.log"):
        text = log.read_text(errors="replace")
        # grpc's own tracebacks are not ours to end.
        if found := OUR_TRACEBACK.search(text):
            pytest.fail(text[max(0, found.start() - 2000) : found.end() + 2000])
    status = target.cluster.cli("status")
    assert status["healthy"], status["problems"]


def good_handshake(export: str) -> bytes:
    options = (
        codec.OptionRequest(c.Option.STRUCTURED_REPLY),
        codec.OptionRequest(c.Option.SET_META_CONTEXT, codec.MetaContextRequest(export, ("base:allocation",)).encode()),
        codec.OptionRequest(c.Option.GO, codec.GoRequest(export).encode()),
    )
    return codec.ClientFlags(3).encode() + b"".join(option.encode() for option in options)


@pytest.mark.parametrize(
    ("node", "export"), [("primary", "vol1"), ("standby", "vol1@s1")], ids=["volumes", "snapshots"]
)
def test_nbd_listeners_survive_mutated_clients(target: Target, node: str, export: str) -> None:
    address = target[node, "nbd"]
    count = scaled(2700)
    asyncio.run(listen_badly(address, client_handshakes(), count, target.randomness))
    before = good_handshake(export)
    asyncio.run(listen_badly(address, requests(), count, target.randomness, before=before))
    print(f"NBD of the {node}: {2 * count} inputs")


def test_the_data_link_survives_mutated_primaries(target: Target) -> None:
    """Strangers without a token; then primaries with one, over TCP and over gRPC, with right and wrong checksums."""
    address = target["standby", "data_link"]
    strangers, primaries = scaled(2500), scaled(800)
    token = b"t" * 32
    hello = encode_header(FrameType.HELLO, 0, 0, 0, 0, 0, 0, token) + token
    asyncio.run(listen_badly(address, [hello, *data_link_frames()], strangers, target.randomness))

    async def run() -> None:
        async with grpc.aio.insecure_channel(str(target["standby", "grpc"])) as channel:
            mirror = MirrorOfOurs(channel, "ours")
            await mirror.create(1 << 20)
            for number in range(primaries):
                opened = await mirror.open()
                token = opened.token
                hello = encode_header(FrameType.HELLO, 0, 0, 0, 0, 0, 0, token) + token
                mutator = Mutator(data_link_frames(1, opened.session), target.randomness)
                said = next(mutator.inputs(1))
                if number % 2:
                    said = repaired_frames(said)
                if number % 100:
                    await say(address, mutator.pieces(hello + said), reset=number % 10 == 1)
                else:
                    await mirror.stream([hello, said])
            await mirror.delete()

    asyncio.run(run())
    print(f"data link: {strangers + primaries} inputs")


def test_grpc_listeners_survive_mutated_bytes(target: Target) -> None:
    count = scaled(150)
    listeners = (("primary", "grpc"), ("standby", "grpc"), ("standby", "export_grpc"), ("backup", "grpc"))

    async def run() -> None:
        corpus = await recorded_grpc_calls(target["primary", "grpc"])
        assert corpus and b"x-name" in corpus[0]
        for listener in listeners:
            # grpc closes when it sees fit.
            await listen_badly(target[listener], corpus, count, target.randomness, listen_s=0.3)

    asyncio.run(run())
    print(f"gRPC connections: {count * len(listeners)} inputs")


def test_grpc_methods_answer_mutated_messages(target: Target) -> None:
    count = scaled(700)
    listeners = {
        "PrimaryService": ("primary", "grpc"),
        "StandbyService": ("standby", "grpc"),
        "ExportService": ("standby", "export_grpc"),
        "BackupService": ("backup", "grpc"),
    }

    async def run() -> None:
        for service, methods in calls("vol1").items():
            await call_badly(target[listeners[service]], service, methods, count, target.randomness)

    asyncio.run(run())
    print(f"gRPC messages: {count * len(listeners)} inputs")
