"""The demonstration's filesystem: an ext4 image with real files of this machine, made and checked without root.

One file in it, `changing.dat`, is full of numbered records, each one block long. Its blocks are what the writer of the
demonstration rewrites: as a real filesystem does when a program overwrites a file in place, so the image stays valid
whatever record stands in which block.
"""

from __future__ import annotations

import filecmp
import os
import random
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused, StillpointError

BLOCK_SIZE = 4096
CHANGING_FILE = "changing.dat"

_RECORD = struct.Struct("<16sQQ")
_MAGIC = b"stillpoint demo\n"
_READ_SIZE = 1024 * 1024

# The first holds files wherever Python runs; the others are what most machines have.
_SOURCES = (Path(os.__file__).parent, Path("/usr/share/doc"), Path("/usr/share"), Path("/usr/lib"))
_FILES_MAX = 4000
# Smaller ones cost time and prove nothing that larger ones do not.
_FILE_SIZE_MIN = 2048
_FILE_SIZE_MAX = 8 * 1024 * 1024
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}
# debugfs reads its command as words, so the file to show must have a plain name.
_PLAIN_NAME = re.compile(r"^[\w./+-]+$")
_SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Image:
    path: Path
    size: int
    file_count: int
    file_bytes: int
    shown_file: str  # path in the image, without the leading slash
    shown_source: Path  # where on this machine it was copied from
    slots: tuple[int, ...]  # offset in the image of each block of the changing file


def record(sequence: int, slot: int) -> bytes:
    """One block: the record that write number `sequence` puts into `slot`. The same numbers make the same bytes."""
    head = _RECORD.pack(_MAGIC, sequence, slot)
    return head + random.Random(sequence << 32 | slot).randbytes(BLOCK_SIZE - len(head))


def read_record(block: bytes | memoryview) -> tuple[int, int] | None:
    """Sequence and slot of the record that a block begins with; None when it is none."""
    magic, sequence, slot = _RECORD.unpack_from(block)
    return (sequence, slot) if magic == _MAGIC else None


def find_tool(name: str) -> str:
    """The program's path. Raises Refused when it is not there."""
    found = shutil.which(name) or shutil.which(name, path=_SYSTEM_FOLDERS)
    if found is None:
        raise Refused(f"the demonstration needs {name}; install e2fsprogs")
    return found


def make_image(path: Path, staging: Path, size: int) -> Image:
    """An ext4 image of `size` bytes, about half of it files of this machine. `staging` is used and removed."""
    slot_count = size // 8 // BLOCK_SIZE
    staging.mkdir()
    try:
        (staging / CHANGING_FILE).write_bytes(b"".join(record(0, slot) for slot in range(slot_count)))
        copied = _copy_files(staging, budget=size // 2)
        _run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK_SIZE), "-L", "stillpoint", "-d", str(staging),
             str(path), f"{size // 1024}k")  # fmt: skip
    finally:
        shutil.rmtree(staging)
    shown_file, shown_source = _file_to_show(copied)
    return Image(
        path=path,
        size=size,
        file_count=len(copied),
        file_bytes=sum(source.size for source in copied.values()),
        shown_file=shown_file,
        shown_source=shown_source,
        slots=_find_slots(path, slot_count),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    path: Path
    size: int


def _copy_files(staging: Path, *, budget: int) -> dict[str, _Source]:
    """Files of this machine into `staging` until the budget is used; name in the image → where it is from."""
    copied: dict[str, _Source] = {}
    for source in _real_files():
        name = str(source.path).lstrip("/")
        room = source.size + 2 * BLOCK_SIZE
        if name in copied or room > budget:
            continue
        target = staging / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path, target)
        except OSError:
            continue  # not readable for this user, or gone
        copied[name] = source
        budget -= room
        if len(copied) == _FILES_MAX:
            break
    if not copied:
        raise StillpointError("found no readable file of this machine to put into the image")
    return copied


def _real_files() -> Iterator[_Source]:
    for top in _SOURCES:
        for folder, folders, names in os.walk(top):
            folders[:] = sorted(set(folders) - _LEFT_OUT)
            for name in names:
                path = Path(folder, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                if stat.S_ISREG(status.st_mode) and _FILE_SIZE_MIN <= status.st_size <= _FILE_SIZE_MAX:
                    yield _Source(path, status.st_size)


def _file_to_show(copied: dict[str, _Source]) -> tuple[str, Path]:
    """The largest with a plain name."""
    name = max((name for name in copied if _PLAIN_NAME.match(name)), key=lambda name: copied[name].size)
    return name, copied[name].path


def _find_slots(path: Path, slot_count: int) -> tuple[int, ...]:
    """Where in the image mke2fs put each block of the changing file: each says its own number."""
    offsets: dict[int, int] = {}
    with path.open("rb") as file:
        base = 0
        while chunk := memoryview(file.read(_READ_SIZE)):
            for start in range(0, len(chunk), BLOCK_SIZE):
                found = read_record(chunk[start : start + BLOCK_SIZE])
                if found is not None:
                    offsets[found[1]] = base + start
            base += len(chunk)
    if len(offsets) != slot_count:
        raise StillpointError(f"found {len(offsets)} of the {slot_count} blocks of {CHANGING_FILE} in the image")
    return tuple(offsets[slot] for slot in range(slot_count))


def data_ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and length of what is not a hole in a file."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < end:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                return  # nothing but a hole is left
            offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, offset - start


def check_filesystem(path: Path) -> str | None:
    """None when `e2fsck -fn` finds nothing to repair, else what it says."""
    checked = subprocess.run([find_tool("e2fsck"), "-fn", str(path)], capture_output=True, text=True, check=False)
    if checked.returncode == 0:
        return None
    return " ".join((checked.stdout + checked.stderr).split())[-300:]


def read_back(image: Image, restored: Path, into: Path) -> bool:
    """Whether the file to show, read out of the restored filesystem into `into`, equals the machine's own."""
    _run("debugfs", "-R", f"dump /{image.shown_file} {into}", str(restored))
    return into.exists() and filecmp.cmp(into, image.shown_source, shallow=False)


def first_difference(one: Path, other: Path) -> int | None:
    """Offset of the first byte in which two files differ; None when they are equal bit for bit."""
    base = 0
    with one.open("rb") as left, other.open("rb") as right:
        while True:
            a, b = left.read(_READ_SIZE), right.read(_READ_SIZE)
            if a != b:
                return base + next(
                    (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
                )
            if not a:
                return None
            base += len(a)


def _run(tool: str, *arguments: str) -> None:
    done = subprocess.run([find_tool(tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise StillpointError(f"{tool} failed with exit code {done.returncode}: {said[-300:]}")
