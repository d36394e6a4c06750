"""What a test needs of the machine beyond Python: tools, root, a Docker engine, loop devices, FUSE.

Use as decorators or in `pytestmark`:

    pytestmark = [requires_root, requires_tools("fio", "nbdkit")]

A test whose machine lacks something is skipped, and the reason says what to install. With STILLPOINT_REQUIRE_ALL=1
every skip is a failure: a run that must leave nothing out cannot pass by leaving things out. `tests/conftest.py` does
both. The probes run when the test is about to, so collecting tests costs nothing.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from tests.support.cgroup import missing_memory_cgroup

REQUIRE_ALL_VARIABLE = "STILLPOINT_REQUIRE_ALL"

# Debian keeps these in folders that are not on every user's PATH.
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_DEBIAN_PACKAGES = {
    "debootstrap": "debootstrap",
    "debugfs": "e2fsprogs",
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "dumpe2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "etcd": "etcd-server",
    "fio": "fio",
    "fsfreeze": "util-linux",
    "fstrim": "util-linux",
    "fusermount3": "fuse3",
    "ip": "iproute2",
    "losetup": "mount",
    "mke2fs": "e2fsprogs",
    "mkfs.ext4": "e2fsprogs",
    "mount": "mount",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "nbdsh": "python3-libnbd",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "strace": "strace",
    "systemd-analyze": "systemd",
    "unshare": "util-linux",
}

requires_root = pytest.mark.root
requires_docker = pytest.mark.docker
requires_loop_devices = pytest.mark.loop_devices
requires_fuse = pytest.mark.fuse
requires_memory_cgroup = pytest.mark.memory_cgroup


def requires_tools(*names: str) -> pytest.MarkDecorator:
    """The programs a test starts, by command name: `requires_tools("fio", "qemu-io")`."""
    return pytest.mark.tools(*names)


def requires_one_tool_of(*names: str) -> pytest.MarkDecorator:
    """Programs of which any one will do: `requires_one_tool_of("nbdfuse", "qemu-nbd")`."""
    return pytest.mark.one_tool_of(*names)


MARKERS = (
    "tools(*names): needs these programs",
    "one_tool_of(*names): needs one of these programs",
    "loop_devices: needs root and /dev/loop-control",
    "fuse: needs /dev/fuse and fusermount3",
    "memory_cgroup: needs root and a memory cgroup that can be written to",
)


def everything_is_required() -> bool:
    return os.environ.get(REQUIRE_ALL_VARIABLE, "") not in ("", "0")


def find_tool(name: str) -> str | None:
    """The program's path, also when it sits in a folder for system programs that PATH lacks."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_SYSTEM_FOLDERS))


def what_is_missing(marks: Iterable[pytest.Mark]) -> str | None:
    """The first thing a test with these marks needs and this machine lacks, and how to get it; None when nothing is."""
    for mark in marks:
        reason = _missing(mark)
        if reason is not None:
            return reason
    return None


def _missing(mark: pytest.Mark) -> str | None:
    match mark.name:
        case "tools":
            return _missing_tools(mark.args)
        case "one_tool_of":
            return None if any(map(find_tool, mark.args)) else f"needs one of {', '.join(mark.args)}"
        case "root":
            return _missing_root()
        case "docker":
            return _missing_docker()
        case "loop_devices":
            return _missing_root() or _missing_path("/dev/loop-control", "loop devices")
        case "memory_cgroup":
            return missing_memory_cgroup()
        case "fuse":
            return _missing_path("/dev/fuse", "FUSE") or _missing_tools(("fusermount3",))
    return None


def _missing_tools(names: Iterable[str]) -> str | None:
    for name in names:
        if find_tool(name) is None:
            package = _DEBIAN_PACKAGES.get(name)
            return f"needs {name}" + (f" (Debian package {package})" if package else "")
    return None


def _missing_root() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


def _missing_path(path: str, what: str) -> str | None:
    return None if Path(path).exists() else f"needs {what}: {path} is not there"


@cache
def _missing_docker() -> str | None:
    docker = find_tool("docker")
    if docker is None:
        return _missing_tools(("docker",))
    try:
        answer = subprocess.run([docker, "info"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "needs a Docker engine: `docker info` got no answer within 20 s"
    return None if answer.returncode == 0 else "needs a Docker engine: `docker info` fails"
