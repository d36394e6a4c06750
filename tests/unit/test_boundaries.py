"""Who may import whom: the contracts are in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_imports_keep_the_boundaries() -> None:
    run = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_proto_is_no_python_package() -> None:
    # A package there would shadow the generated code of the same name, or be shipped beside it.
    assert not list((ROOT / "proto").rglob("__init__.py"))
