"""What deploy/compose ships fits the programs: a renamed configuration key is noticed here, without Docker."""

from pathlib import Path

import pytest
import yaml

from backupnode.config import BackupNodeConfig
from primary.config import PrimaryConfig
from standby.config import StandbyConfig
from stillpoint.cli.cluster import Cluster
from stillpoint.config import load_config

FOLDER = Path(__file__).resolve().parents[2] / "deploy/compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())

CONFIG_CLASSES: dict[str, type] = {
    "primary": PrimaryConfig,
    "standby": StandbyConfig,
    "backup": BackupNodeConfig,
    "cluster": Cluster,
}


@pytest.mark.parametrize("name", CONFIG_CLASSES)
def test_every_shipped_file_loads(name: str) -> None:
    load_config(FOLDER / f"config/{name}.yaml", CONFIG_CLASSES[name])


def test_cluster_file_names_the_ports_that_compose_publishes() -> None:
    published = {
        port.split("-")[-1].split("}")[0] for service in COMPOSE["services"].values() for port in service["ports"]
    }
    cluster = yaml.safe_load((FOLDER / "config/cluster.yaml").read_text())
    assert {address.removeprefix("127.0.0.1:") for node in cluster.values() for address in node.values()} == published


def test_backup_node_and_primary_share_no_network() -> None:
    services = COMPOSE["services"]
    assert not set(services["backup"]["networks"]) & set(services["primary"]["networks"])
    assert COMPOSE["networks"]["datalink"] == {"internal": True}
