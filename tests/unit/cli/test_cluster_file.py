"""Which cluster file is used, and what may stand in it."""

from pathlib import Path

import pytest

from stillpoint.cli.cluster import CLUSTER_VARIABLE, find_cluster_file, load_cluster
from stillpoint.config import Address
from stillpoint.errors import ConfigError

EXAMPLE = """
primary: { grpc: "127.0.0.1:7410", nbd: "127.0.0.1:10809" }
standby: { grpc: "127.0.0.1:7420", export_grpc: "127.0.0.1:7422", nbd: "127.0.0.1:10810", volume_nbd: "h:10809" }
backup:  { grpc: "127.0.0.1:7430", nbd: "127.0.0.1:10811" }
"""


@pytest.fixture(autouse=True)
def no_cluster_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str = EXAMPLE) -> Path:
    path.write_text(text)
    return path


def test_every_address_is_read(tmp_path: Path) -> None:
    cluster = load_cluster(write(tmp_path / "c.yaml"))
    assert cluster.standby.export_grpc == Address("127.0.0.1", 7422)
    assert str(cluster.standby.volume_nbd) == "h:10809"


def test_the_option_goes_before_the_variable_and_the_variable_before_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, named, from_environment = (write(tmp_path / name) for name in ("cluster.yaml", "named", "variable"))
    assert find_cluster_file(None).resolve() == here
    monkeypatch.setenv(CLUSTER_VARIABLE, str(from_environment))
    assert find_cluster_file(None) == from_environment
    assert find_cluster_file(named) == named


def test_a_missing_file_says_how_it_was_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--cluster FILE"):
        find_cluster_file(None)
    with pytest.raises(ConfigError, match="from --cluster"):
        find_cluster_file(tmp_path / "none")
    monkeypatch.setenv(CLUSTER_VARIABLE, "/none")
    with pytest.raises(ConfigError, match="STILLPOINT_CLUSTER"):
        find_cluster_file(None)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("volume_nbd", "volume_nbdd", "did you mean 'volume_nbd'"),
        ("backup:", "bakcup:", "did you mean 'backup'"),
        ('grpc: "127.0.0.1:7410", ', "", "'grpc' is missing"),
        ("127.0.0.1:7410", "127.0.0.1", "not an address"),
        ("127.0.0.1:7410", "127.0.0.1:99999", "not an address"),
        ("primary: {", "primary: {{", "not YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = write(tmp_path / "c.yaml", EXAMPLE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=named) as caught:
        load_cluster(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
