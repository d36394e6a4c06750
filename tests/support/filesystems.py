"""File systems on NBD exports, mounted by the kernel: FUSE shows an export as a file, a loop device makes it a disk.

For tests with `requires_root`, `requires_fuse`, `requires_loop_devices` and `requires_tools(*TOOLS)`.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

TOOLS = ("nbdfuse", "losetup", "mkfs.ext4", "mount", "fusermount3", "e2fsck")


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def loop_device(uri: str, folder: Path, *, read_only: bool = False) -> Iterator[str]:
    """The export as a block device."""
    point = folder / "fuse"
    point.mkdir(exist_ok=True)
    with subprocess.Popen(["nbdfuse", str(point / "disk"), uri]) as fuse:
        try:
            deadline = time.monotonic() + 10
            while subprocess.run(["mountpoint", "-q", str(point)], check=False).returncode != 0:
                assert fuse.poll() is None, "nbdfuse ended"
                assert time.monotonic() < deadline, "nbdfuse does not mount"
                time.sleep(0.02)
            options = ["--read-only"] if read_only else []
            device = _run("losetup", "--find", "--show", *options, point / "disk").strip()
            try:
                yield device
            finally:
                _run("losetup", "--detach", device)
        finally:
            subprocess.run(["fusermount3", "-u", str(point)], check=False)
            fuse.wait(20)


@contextlib.contextmanager
def mounted(device: str, folder: Path, *, options: str = "rw") -> Iterator[Path]:
    """Where the file system on the device is to be seen meanwhile."""
    root = folder / "root"
    root.mkdir(exist_ok=True)
    _run("mount", "-o", options, device, root)
    try:
        # Without this a mount that silently failed would let the test pass on the folder beneath.
        _run("mountpoint", "-q", root)
        yield root
    finally:
        _run("umount", root)
