"""The rules for leaving tests out, checked by running small test files in a pytest of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FILES = {
    "test_tool.py": """
from tests.support.requirements import requires_tools

@requires_tools("no-such-program")
def test_it(): pass
""",
    "test_plain.py": """
import pytest

def test_it(): pytest.skip("not today")
""",
    "test_module.py": """
import pytest

pytest.skip("not today", allow_module_level=True)
""",
    "test_expected_failure.py": """
import pytest

@pytest.mark.xfail(strict=True)
def test_it(): assert False
""",
}


def test_tests_are_left_out_with_a_reason(tmp_path: Path) -> None:
    output = _run(tmp_path, required="")
    assert "3 skipped, 1 xfailed" in output
    assert "needs no-such-program" in output


def test_a_test_left_out_fails_when_everything_is_required(tmp_path: Path) -> None:
    output = _run(tmp_path, required="1")
    assert "1 failed, 1 xfailed, 2 errors" in output
    assert "left out although STILLPOINT_REQUIRE_ALL is set" in output


def _run(folder: Path, *, required: str) -> str:
    for name, source in FILES.items():
        (folder / name).write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STILLPOINT_REQUIRE_ALL": required}
    run = subprocess.run(
        [*command, "--rootdir", str(folder), str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout + run.stderr
