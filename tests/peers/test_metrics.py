"""The metrics of a real cluster agree with what its clients did."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from stillpoint.nbd import constants as c
from tests.support.cluster import LocalCluster
from tests.support.nbd import RawClient

pytestmark = pytest.mark.slow

MONITORING = Path(__file__).resolve().parents[2] / "deploy/compose/monitoring"

Samples = dict[tuple[Any, ...], float]


def scrape(cluster: LocalCluster, node: str) -> Samples:
    """By (name without prefix, label values in the order of their names)."""
    address = yaml.safe_load((cluster.directory / f"{node}.yaml").read_text())["listen"]["metrics"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = [
        (
            (sample.name.removeprefix("stillpoint_"), *(value for _, value in sorted(sample.labels.items()))),
            sample.value,
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    found = dict(samples)
    assert len(found) == len(samples), "a sample comes twice, and Prometheus drops what does"
    return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster.up(tmp_path / "cluster", "vol1:16MiB") as nodes:
        yield nodes


def test_metrics_of_all_nodes_tell_what_clients_did(cluster: LocalCluster) -> None:
    port = int(cluster.env["primary"]["nbd"].rpartition(":")[2])
    with RawClient(port) as client:
        client.go("vol1")
        for number in range(5):
            assert client.ask(c.Command.WRITE, number * 4096, 4096, payload=b"w" * 4096) == 0
        for number in range(3):
            client.request(c.Command.READ, number * 4096, 4096)
            assert client.reply()[1] == 0
        assert client.ask(c.Command.FLUSH) == 0
        assert client.ask(c.Command.TRIM, 1 << 20, 4096) == 0
        assert client.ask(c.Command.READ, 1 << 30, 4096) == c.Errno.EINVAL
        primary = scrape(cluster, "primary")
        assert primary["volume_connections", "vol1"] == primary["nbd_connections", "volumes"] == 1
    requests = {
        operation: primary["nbd_requests_total", "volumes", operation, "vol1"]
        for operation in ("read", "write", "trim")
    }
    assert requests == {"read": 3, "write": 5, "trim": 1}
    assert primary["nbd_requests_total", "volumes", "flush", "vol1"] == 1
    assert primary["nbd_bytes_total", "volumes", "write", "vol1"] == 5 * 4096
    assert primary["nbd_bytes_total", "volumes", "read", "vol1"] == 3 * 4096
    assert primary["nbd_errors_total", "volumes", "vol1"] == 1
    assert primary["nbd_request_seconds_count", "volumes", "read", "vol1"] == 3
    assert primary["nbd_request_seconds_count", "volumes", "write", "vol1"] == 6  # the trim too
    assert 0 < primary["nbd_request_seconds_sum", "volumes", "flush", "vol1"] < 10
    assert primary["pair_state", "in_sync", "vol1"] == 1
    assert primary["pair_dirty_bytes", "vol1"] == 0

    cluster.cli("snapshot", "create", "vol1", "--name", "s1")
    port = int(cluster.env["standby"]["nbd"].rpartition(":")[2])
    with RawClient(port) as client:
        client.go("vol1@s1")
        client.request(c.Command.READ, 0, 8192)
        assert client.reply()[2] == b"w" * 8192
    standby = scrape(cluster, "standby")
    assert standby["mirror_state", "in_sync", "vol1"] == standby["export_up",] == 1
    assert standby["mirror_received_bytes_total", "vol1"] > 5 * 4096
    assert standby["snapshots", "active", "vol1"] == 1
    assert standby["nbd_requests_total", "snapshots", "read", "vol1"] == 1
    cluster.cli("snapshot", "delete", "vol1@s1")
    assert scrape(cluster, "standby")["nbd_bytes_total", "snapshots", "read", "vol1"] == 8192  # a counter never falls

    cluster.cli("backup", "run", "vol1")
    backup = scrape(cluster, "backup")
    assert backup["backup_runs_total", "ok"] == 1 and backup["backup_runs_total", "failed"] == 0
    assert cluster.run("backup", "run", "nosuch").code == 1
    assert scrape(cluster, "backup")["backup_runs_total", "failed"] == 1

    exposed = {sample[0] for samples in (primary, standby, backup) for sample in samples}
    exposed |= {sample[0] for sample in scrape(cluster, "standby")}
    # The store is made with the first snapshot, and these two when there is a backup.
    for path in (MONITORING / "rules.yaml", MONITORING / "dashboards/stillpoint.json"):
        named = set(re.findall(r"stillpoint_(\w+)", path.read_text()))
        assert named and named <= exposed | {"pair_state"}, f"{path.name} asks for what no node tells"

    cluster.kill("standby")
    primary = scrape(cluster, "primary")
    assert primary["pair_state", "in_sync", "vol1"] == 0
