"""What deploy/systemd ships fits the programs, the example configurations and systemd's own checks."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backupnode.config import BackupNodeConfig
from primary.daemon import PrimaryDaemonConfig, StandbyDaemonConfig
from stillpoint.config import load_config
from tests.support.requirements import requires_tools

FOLDER = Path(__file__).resolve().parents[2] / "deploy/systemd"
CONFIG_CLASSES: dict[str, type[PrimaryDaemonConfig] | type[StandbyDaemonConfig] | type[BackupNodeConfig]] = {
    "primary": PrimaryDaemonConfig,
    "standby": StandbyDaemonConfig,
    "backup": BackupNodeConfig,
}
PROGRAMS = {"primary": "stillpoint-primary", "standby": "stillpoint-standby", "backup": "stillpoint-backupnode"}


class Unit(configparser.RawConfigParser):
    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, delimiters=("=",))
        self.read_string(path.read_text())

    def optionxform(self, optionstr: str) -> str:
        return optionstr


@pytest.mark.parametrize("node", CONFIG_CLASSES)
def test_each_unit_starts_its_program_with_the_configuration_and_state_that_the_example_names(node: str) -> None:
    service = Unit(FOLDER / f"stillpoint-{node}.service")["Service"]
    assert service["ExecStart"] == f"/opt/stillpoint/bin/{PROGRAMS[node]} --config /etc/stillpoint/{node}.yaml"
    assert (Path(sys.executable).parent / PROGRAMS[node]).exists()
    config = load_config(FOLDER / f"config/{node}.yaml", CONFIG_CLASSES[node])
    assert str(config.state_dir) == f"/var/lib/{service['StateDirectory']}"
    assert service["Type"] == "notify" and float(service["WatchdogSec"]) > 0


def test_units_differ_only_where_the_nodes_do() -> None:
    texts = set()
    for node in CONFIG_CLASSES:
        text = (FOLDER / f"stillpoint-{node}.service").read_text()
        text = text.replace(PROGRAMS[node], "PROGRAM").replace(f"/{node}", "/NODE")
        texts.add(re.sub(r"Description=.*|# .*\nTimeoutStartSec=.*", "", text))
    assert len(texts) == 1


@requires_tools("systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    units = []
    for path in (*FOLDER.glob("*.service"), FOLDER / "stillpoint.target"):
        units.append(tmp_path / path.name)
        # The programs of this checkout stand for the installed ones.
        units[-1].write_text(path.read_text().replace("/opt/stillpoint/bin", str(Path(sys.executable).parent)))
    run = subprocess.run(["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, check=False)
    complaints = [line for line in run.stderr.splitlines() if "stillpoint" in line]
    assert run.returncode == 0 and not complaints, run.stderr


@requires_tools("systemd-analyze")
@pytest.mark.parametrize("node", CONFIG_CLASSES)
def test_the_units_leave_little_exposed(node: str) -> None:
    unit = FOLDER / f"stillpoint-{node}.service"
    # In tenths of 10; what is left is the network, which a storage node needs.
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(unit)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-300:] + run.stderr
