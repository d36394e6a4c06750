"""Small JSON documents that survive a power loss whole: either the old one or the new one, never a mixture.

Crash points of `write_document`: before the rename the old document stands and a `.new` file is left over, which the
next write replaces; after it the new one stands, and the folder's fsync makes that last.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import DataCorrupt, DeviceError, NotFound


def boot_id() -> str:
    """Names this run of the operating system: while it stays the same, what the page cache took is not lost."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable: its new, renamed and removed entries. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Replace the document at `path`, durably on return. Raises DeviceError; the old document then stands."""
    fresh = path.with_name(path.name + ".new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise DeviceError(f"cannot write {path}: {error.strerror}", error.errno or 0) from error


def read_document(path: Path) -> dict[str, Any]:
    """The document at `path`. Raises NotFound, or DataCorrupt when it is no JSON object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataCorrupt(f"cannot read {path}: {error}") from None
    if not isinstance(document, dict):
        raise DataCorrupt(f"{path} does not hold an object")
    return document
