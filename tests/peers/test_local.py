"""standbyctl local: three nodes on this machine, found again, killed, restarted on their ports, and stopped."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import LocalCluster, run_standbyctl

pytestmark = pytest.mark.timeout(240)

NODES = ("primary", "standby", "backup")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def pids(env: dict[str, dict[str, int]]) -> dict[str, int]:
    return {node: env[node]["pid"] for node in NODES}


def ports(env: dict[str, dict[str, str]]) -> list[str]:
    return [env[node][key] for node in NODES for key in ("grpc", "nbd")]


def test_up_again_keeps_what_runs_and_starts_what_is_missing(own_cluster: LocalCluster) -> None:
    before = own_cluster.env
    LocalCluster.up(own_cluster.directory, "vol1:1MiB")
    assert pids(own_cluster.env) == pids(before)
    own_cluster.kill("backup")
    assert own_cluster.env["backup"]["pid"] is None
    LocalCluster.up(own_cluster.directory, "vol1:1MiB", "vol2:1MiB")
    after = own_cluster.env
    assert sorted(after["volumes"]) == ["vol1", "vol2"]
    assert after["primary"]["pid"] == before["primary"]["pid"]
    assert after["backup"]["pid"] not in (None, before["backup"]["pid"])
    assert ports(after) == ports(before)


def test_a_killed_standby_takes_its_export_process_with_it(own_cluster: LocalCluster) -> None:
    env = own_cluster.env
    assert alive(env["standby"]["pid"]) and alive(env["standby"]["export_pid"])
    own_cluster.kill("standby")
    assert not alive(env["standby"]["pid"]) and not alive(env["standby"]["export_pid"])
    gone = own_cluster.env
    assert gone["standby"]["pid"] is None and gone["standby"]["export_pid"] is None
    own_cluster.start("standby")
    again = own_cluster.env
    assert ports(again) == ports(env)
    assert alive(again["standby"]["export_pid"])


def test_paths_of_a_killed_node_are_still_told(own_cluster: LocalCluster) -> None:
    LocalCluster.up(own_cluster.directory, "vol1:1MiB")
    before = own_cluster.env["volumes"]
    assert Path(before["vol1"]["primary_path"]).exists()
    own_cluster.kill("primary")
    assert own_cluster.env["volumes"] == before


def test_down_stops_every_process_and_up_brings_the_volumes_back(own_cluster: LocalCluster) -> None:
    LocalCluster.up(own_cluster.directory, "vol1:1MiB")
    env = own_cluster.env
    own_cluster.down()
    assert not any(alive(pid) for pid in (*pids(env).values(), env["standby"]["export_pid"]))
    own_cluster.down()  # nothing to do is no error
    LocalCluster.up(own_cluster.directory, "vol1:1MiB")
    assert list(own_cluster.env["volumes"]) == ["vol1"]


def test_up_with_another_size_of_a_volume_is_refused(own_cluster: LocalCluster) -> None:
    LocalCluster.up(own_cluster.directory, "vol1:1MiB")
    result = run_standbyctl("--json", "local", "up", "--dir", own_cluster.directory, "--volume", "vol1:2MiB")
    assert result.code == 1
    assert "vol1 is there already with 1 MiB" in result.stderr
    assert all(alive(pid) for pid in pids(own_cluster.env).values())


def test_the_grpc_carrier_can_be_chosen(tmp_path: Path) -> None:
    with LocalCluster.up(tmp_path / "c", "vol1:1MiB", carrier="grpc") as cluster:
        assert cluster.cli("volume", "show", "vol1")["pair"]["carrier"] == "grpc"
        assert cluster.cli("volume", "show", "vol1")["pair"]["state"] == "in_sync"
        refused = run_standbyctl("local", "up", "--dir", cluster.directory, "--carrier", "tcp")
        assert refused.code == 1 and "carrier grpc" in refused.stderr


def test_a_port_in_use_is_named_with_the_nodes_own_words(own_cluster: LocalCluster) -> None:
    host, port = own_cluster.env["primary"]["nbd"].removeprefix("nbd://").split(":")
    own_cluster.kill("primary")
    with socket.create_server((host, int(port))):
        result = run_standbyctl("local", "start", "primary", "--dir", own_cluster.directory)
        assert result.code == 1
        assert "primary stopped while it started" in result.error and f"{host}:{port}" in result.error
    own_cluster.start("primary")


def test_what_up_started_is_stopped_when_it_fails(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    bad = run_standbyctl("local", "up", "--dir", directory, "--volume", "vol1:100000")
    assert bad.code == 1 and "Traceback" not in bad.stderr
    assert not (directory / "cluster.yaml").exists()
    running = subprocess.run(["pgrep", "-f", str(directory)], capture_output=True, text=True, check=False)
    assert running.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["up", "--volume", "vol1"], 2),
        (["up", "--volume", "a/b:1MiB"], 1),
        (["up", "--volume", "vol1:0"], 2),
        (["up", "--carrier", "pigeon"], 2),
        (["down"], 1),
        (["env"], 1),
        (["kill", "primary"], 1),
        (["start", "primary"], 1),
    ],
)
def test_mistakes_start_nothing(tmp_path: Path, arguments: list[str], code: int) -> None:
    directory = tmp_path / "c"
    result = run_standbyctl("local", *arguments, "--dir", directory)
    assert result.code == code
    assert "Traceback" not in result.stderr and result.stderr.splitlines()[-1].startswith("standbyctl: ")
    assert not (directory / "cluster.yaml").exists()


def test_killing_a_node_that_does_not_run_says_so(own_cluster: LocalCluster) -> None:
    own_cluster.kill("backup")
    result = run_standbyctl("local", "kill", "backup", "--dir", own_cluster.directory)
    assert (result.code, result.error) == (1, "the backup does not run")


@pytest.mark.parametrize(("node", "module"), [("primary", "primary"), ("standby", "standby"), ("backup", "backupnode")])
def test_a_second_daemon_on_one_state_directory_is_refused(
    local_cluster: LocalCluster, tmp_path: Path, node: str, module: str
) -> None:
    config = yaml.safe_load((local_cluster.directory / f"{node}.yaml").read_text())
    config["listen"] = dict.fromkeys(config["listen"], "127.0.0.1:0")
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump(config))
    ended = subprocess.run(
        [sys.executable, "-m", module, "--config", str(second)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode in (1, 2)
    last = ended.stderr.splitlines()[-1]
    assert "in use" in last and "Traceback" not in ended.stderr


@pytest.mark.parametrize(("node", "module"), [("primary", "primary"), ("standby", "standby"), ("backup", "backupnode")])
def test_an_unknown_key_in_a_nodes_configuration_is_named(tmp_path: Path, node: str, module: str) -> None:
    file = tmp_path / f"{node}.yaml"
    file.write_text(yaml.safe_dump({"node": node, "state_dir": str(tmp_path / "state"), "lisen": {}}))
    ended = subprocess.run(
        [sys.executable, "-m", module, "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert "did you mean 'listen'" in line
    assert not (tmp_path / "state").exists()


def test_two_ups_at_once_make_one_cluster(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    script = "import sys; from stillpoint.cli.standbyctl import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "--json", "local", "up", "--dir", str(directory)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        answers = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [0, 0], answers
        assert answers[0][0] == answers[1][0]
    finally:
        LocalCluster(directory).destroy()


def test_the_nodes_outlive_the_shell_that_started_them(own_cluster: LocalCluster) -> None:
    for pid in pids(own_cluster.env).values():
        assert os.getsid(pid) == pid


def test_a_standby_and_its_export_process_may_open_as_many_files_as_the_system_lets_them(
    own_cluster: LocalCluster,
) -> None:
    own_cluster.kill("standby")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        own_cluster.start("standby")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    standby = own_cluster.env["standby"]
    for pid in (standby["pid"], standby["export_pid"]):
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)
