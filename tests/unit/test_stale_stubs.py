"""The committed gRPC code is what the .proto files and the pinned generator make of each other."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("stillpoint/wire/v1")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stubs")
    subprocess.run([sys.executable, str(ROOT / "deploy/ci/generate_stubs.py"), str(output)], check=True)
    return output / PACKAGE


def test_committed_grpc_code_is_what_make_proto_generates(regenerated: Path) -> None:
    committed, fresh = _files(ROOT / PACKAGE), _files(regenerated)
    assert sorted(committed) == sorted(fresh), "run `make proto`"
    stale = [name for name in fresh if committed[name] != fresh[name]]
    assert not stale, "run `make proto`"


def test_generator_is_pinned_to_the_lowest_grpc_we_support() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (line for line in project["optional-dependencies"]["dev"] if line.startswith("grpcio-tools"))
    pinned = pin.removeprefix("grpcio-tools==")
    assert version("grpcio-tools") == pinned
    assert f"grpcio>={pinned}" in project["dependencies"]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".py", ".pyi")}
