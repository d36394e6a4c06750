"""A local cluster is secured as clusters of three machines are, and says so when it is not."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import grpc
import pytest

from stillpoint.cli.cluster import read_cluster
from stillpoint.cli.health import what_is_wrong
from stillpoint.config import Address, NbdTls
from stillpoint.errors import InvalidRequest
from stillpoint.nbd.client import NbdClient
from stillpoint.wire.channel import open_channel
from stillpoint.wire.v1 import common_pb2, primary_pb2_grpc
from tests.support.cluster import LocalCluster, run_standbyctl


def test_a_local_cluster_takes_no_call_in_plaintext(local_cluster: LocalCluster) -> None:
    environment = local_cluster.env

    async def call(address: str) -> grpc.StatusCode | None:
        async with open_channel(Address.parse(address)) as channel:
            stub = primary_pb2_grpc.PrimaryServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                await stub.GetStatus(common_pb2.Empty(), timeout=10)
            except grpc.RpcError as error:
                return error.code()
        return None

    for node in ("primary", "standby", "backup"):
        assert asyncio.run(call(environment[node]["grpc"])) is grpc.StatusCode.UNAVAILABLE
        assert what_is_wrong(environment[node]["grpc"]) is not None
        assert what_is_wrong(environment[node]["grpc"], Path(environment["tls"]["admin"])) is None


def test_its_nbd_ports_take_plaintext_and_tls(local_cluster: LocalCluster) -> None:
    environment = local_cluster.env
    local_cluster.cli("volume", "create", "both", "--size", "1MiB")
    plain = f"{environment['primary']['nbd']}/both"
    assert plain.startswith("nbd://")
    secured = plain.replace("nbd://", "nbds://") + f"?tls-certificates={environment['tls']['client']}"

    async def write_and_read() -> None:
        async with await NbdClient.connect(secured) as client:
            await client.write(0, b"by TLS")
        async with await NbdClient.connect(plain) as client:
            assert await client.read(0, 6) == b"by TLS"

    try:
        asyncio.run(write_and_read())
    finally:
        local_cluster.cli("volume", "delete", "both", "--yes")


def test_the_keys_of_a_local_cluster_are_for_its_user_alone(local_cluster: LocalCluster) -> None:
    keys = list((local_cluster.directory / "pki").rglob("*key.pem"))
    assert len([key for key in keys if not key.is_symlink()]) == 6
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_a_cluster_stays_as_it_was_made(local_cluster: LocalCluster) -> None:
    for option, made in (("--insecure", "with TLS between the nodes"), ("--nbd-tls", "with TLS between the nodes")):
        result = run_standbyctl("local", "up", "--dir", local_cluster.directory, option)
        assert result.code == 1 and made in result.stderr.splitlines()[-1]


def test_a_cluster_without_tls_is_asked_for_and_called_what_it_is(tmp_path: Path) -> None:
    directory = tmp_path / "cluster"
    try:
        result = run_standbyctl("--json", "local", "up", "--dir", directory, "--insecure", timeout_s=150)
        assert result.code == 0 and "INSECURE: no TLS" in result.stderr, result.stderr
        assert result.document["tls"] is None
        assert not (directory / "pki").exists()
        assert what_is_wrong(result.document["primary"]["grpc"]) is None
        log = (directory / "logs" / "primary.log").read_text()
        assert "everything travels in plaintext, on loopback only" in log
    finally:
        LocalCluster(directory).destroy()


def test_a_cluster_file_names_certificates_from_where_it_lies(tmp_path: Path) -> None:
    addresses = '{ grpc: "127.0.0.1:1", nbd: "127.0.0.1:2" }'
    standby = '{ grpc: "127.0.0.1:1", export_grpc: "127.0.0.1:3", nbd: "127.0.0.1:2", volume_nbd: "127.0.0.1:4" }'
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"primary: {addresses}\nstandby: {standby}\nbackup: {addresses}\ntls: {{ directory: pki/me, nbd: require }}\n"
    )
    cluster = read_cluster(file)
    assert cluster.tls is not None and cluster.tls.directory == tmp_path / "pki/me"
    near, far = Address("127.0.0.1", 1), Address("192.0.2.1", 1)
    assert cluster.tls.nbd is NbdTls.REQUIRE and cluster.nbd_uri(near, "v") == "nbds://127.0.0.1:1/v"
    file.write_text(file.read_text().replace("require", "auto"))
    cluster = read_cluster(file)
    assert [cluster.nbd_uri(address, "v") for address in (near, far)] == ["nbd://127.0.0.1:1/v", "nbds://192.0.2.1:1/v"]
    assert cluster.own_nbd_uri(near, "v") == f"nbds://127.0.0.1:1/v?tls-certificates={tmp_path}/pki/me"
    file.write_text(file.read_text().replace("auto", "sometimes"))
    with pytest.raises(InvalidRequest, match="auto, allow, require"):
        read_cluster(file)
