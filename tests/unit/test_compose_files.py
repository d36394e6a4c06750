"""What deploy/compose ships fits the programs: a renamed configuration key is noticed here, without Docker."""

from pathlib import Path

import pytest
import yaml

from backupnode.config import BackupNodeConfig
from primary.daemon import PrimaryDaemonConfig, StandbyDaemonConfig
from stillpoint.cli.cluster import Cluster
from stillpoint.config import load_config

FOLDER = Path(__file__).resolve().parents[2] / "deploy/compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())

CONFIG_CLASSES: dict[str, type] = {
    "primary": PrimaryDaemonConfig,
    "standby": StandbyDaemonConfig,
    "backup": BackupNodeConfig,
    "cluster": Cluster,
}


@pytest.mark.parametrize("name", CONFIG_CLASSES)
def test_every_shipped_file_loads(name: str) -> None:
    load_config(FOLDER / f"config/{name}.yaml", CONFIG_CLASSES[name])


def test_cluster_file_names_the_ports_that_compose_publishes() -> None:
    nodes = [service for service in COMPOSE["services"].values() if "profiles" not in service]
    published = {port.split("-")[-1].split("}")[0] for service in nodes for port in service.get("ports", ())}
    cluster = yaml.safe_load((FOLDER / "config/cluster.yaml").read_text())
    named = {address for node in ("primary", "standby", "backup") for address in cluster[node].values()}
    assert {address.removeprefix("127.0.0.1:") for address in named} == published


def test_backup_node_and_primary_share_no_network() -> None:
    services = COMPOSE["services"]
    assert not set(services["backup"]["networks"]) & set(services["primary"]["networks"])
    assert COMPOSE["networks"]["datalink"] == {"internal": True}


def test_prometheus_asks_every_node_at_the_port_where_it_answers() -> None:
    jobs = yaml.safe_load((FOLDER / "monitoring/prometheus.yaml").read_text())["scrape_configs"]
    targets = {target for job in jobs for each in job["static_configs"] for target in each["targets"]}
    nodes = ("primary", "standby", "backup")
    listen = {node: yaml.safe_load((FOLDER / f"config/{node}.yaml").read_text())["listen"] for node in nodes}
    assert targets == {f"{node}:{listen[node]['metrics'].partition(':')[2]}" for node in nodes}
    reachable = set(COMPOSE["services"]["prometheus"]["networks"])
    for node in nodes:
        assert reachable & set(COMPOSE["services"][node]["networks"])
    # It must not become a way from the backup node to the primary: nothing of it is forwarded.
    assert COMPOSE["services"]["prometheus"]["cap_drop"] == ["ALL"]


@pytest.mark.parametrize("service", ["primary", "standby", "backup"])
def test_every_node_is_confined(service: str) -> None:
    node = COMPOSE["services"][service]
    assert node["read_only"] and node["cap_drop"] == ["ALL"] and node["restart"] == "unless-stopped"
    assert "mem_limit" in node and "pids_limit" in node and "stillpoint.cli.health" in node["healthcheck"]["test"]
