"""Names of backups: `20261123T101502-vol1-3f9a`, the second it began (UTC), the volume, four random hex digits.

They sort by time. They become file names, so a text from outside is one only after `parse_backup_id` has looked at it.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import NewType

from stillpoint.config import check_name
from stillpoint.errors import InvalidRequest

BackupId = NewType("BackupId", str)

_PATTERN = re.compile(r"[0-9]{8}T[0-9]{6}-[A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9a-f]{4}", re.ASCII)


def parse_backup_id(text: str) -> BackupId:
    """Raises InvalidRequest for everything that `new_backup_id` cannot have made."""
    if not _PATTERN.fullmatch(text):
        raise InvalidRequest(f"{text[:100]!r} is not a backup id; `standbyctl backup list` shows them")
    return BackupId(text)


def new_backup_id(volume: str, now_ns: int) -> BackupId:
    """A fresh one. The caller makes sure that it is not taken."""
    check_name(volume, "volume")
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_ns // 1_000_000_000))
    return parse_backup_id(f"{stamp}-{volume}-{secrets.token_hex(2)}")
