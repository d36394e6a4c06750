"""Backup repositories behind one promise (`interface.Repository`). Format: README.md."""

from .backup_id import BackupId, parse_backup_id
from .interface import (
    BackupReader,
    BackupRecord,
    BackupWriter,
    CheckReport,
    CollectionReport,
    Listing,
    Origin,
    Repository,
    Usage,
)
from .keys import Secret
from .repository import PackRepository, ReadOnlyRepository, open_directory

__all__ = [
    "BackupId",
    "BackupReader",
    "BackupRecord",
    "BackupWriter",
    "CheckReport",
    "CollectionReport",
    "Listing",
    "Origin",
    "PackRepository",
    "ReadOnlyRepository",
    "Repository",
    "Secret",
    "Usage",
    "open_directory",
    "parse_backup_id",
]
