"""`mirror verify` on a pair in use: no difference that is not real, and every one that is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.test_mirroring import assert_same_disk, background_writes, fill, pair_of, wait_until
from tests.support.cluster import LocalCluster
from tests.support.requirements import requires_tools

pytestmark = [requires_tools("nbdcopy", "fio", "qemu-io"), pytest.mark.timeout(180)]

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture(params=["tcp", "grpc"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster.up(tmp_path / "cluster", f"vol:{SIZE}", carrier=request.param) as cluster:
        yield cluster


def damage(cluster: LocalCluster, offset: int, length: int) -> None:
    """Change the mirror behind the standby's back, as a bad disk would."""
    with Path(cluster.env["volumes"]["vol"]["mirror_path"]).open("r+b") as mirror:
        mirror.seek(offset)
        old = mirror.read(length)
        mirror.seek(offset)
        mirror.write(bytes(byte ^ 0xFF for byte in old))


def test_a_pair_under_load_shows_no_false_difference(pair: LocalCluster) -> None:
    fill(pair, 1)
    pair.cli("snapshot", "create", "vol", "--name", "s")  # so that writes are staged, too
    load = background_writes(pair, 4)
    compared = 0
    while load.poll() is None:
        found = pair.cli("mirror", "verify", "vol")
        assert found["different"] == []
        compared += found["compared_bytes"]
    assert load.returncode == 0
    assert compared >= SIZE


def test_every_damaged_byte_is_found_and_repaired(pair: LocalCluster) -> None:
    fill(pair, 2)
    assert pair.cli("mirror", "verify", "vol")["different"] == []
    damage(pair, 5 * MIB + 77, 1)
    damage(pair, 20 * MIB, 3 * MIB)
    result = pair.run("--json", "mirror", "verify", "vol")
    assert result.code == 1
    assert result.document["different"] == [
        {"offset": 5 * MIB, "length": 256 << 10},
        {"offset": 20 * MIB, "length": 3 * MIB},
    ]
    assert pair_of(pair)["mismatch_bytes"] == (3 * MIB) + (256 << 10)
    assert pair.run("status").code == 1
    result = pair.run("--json", "mirror", "verify", "vol", "--repair")
    assert (result.code, result.document["repaired"]) == (1, True)
    wait_until(pair, "in_sync")
    assert pair.cli("mirror", "verify", "vol")["different"] == []
    assert_same_disk(pair)
    assert pair.run("status").code == 0


def test_data_where_the_volume_has_a_hole_is_found(pair: LocalCluster) -> None:
    pair.cli("volume", "create", "sparse", "--size", "1GiB")
    assert pair.cli("mirror", "verify", "sparse") == {
        "volume": "sparse", "compared_bytes": 1 << 30, "different": [], "undecided_bytes": 0, "repaired": False,
    }  # fmt: skip
    with Path(pair.env["volumes"]["sparse"]["mirror_path"]).open("r+b") as mirror:
        mirror.seek(700 * MIB)
        mirror.write(b"x")
    different = pair.run("--json", "mirror", "verify", "sparse").document["different"]
    assert len(different) == 1
    assert different[0]["offset"] <= 700 * MIB < different[0]["offset"] + different[0]["length"]


def test_a_pair_that_is_apart_is_not_compared(pair: LocalCluster) -> None:
    pair.kill("standby")
    result = pair.run("mirror", "verify", "vol")
    assert result.code == 1
    assert "not in sync" in result.error
