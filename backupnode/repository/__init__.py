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
    Partial,
    Region,
    Repository,
    Usage,
)
from .keys import Secret
from .location import storage_at
from .opening import open_directory, open_storage
from .read_only import ReadOnlyRepository
from .repository import PackRepository
from .s3_config import S3Config

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
    "Partial",
    "ReadOnlyRepository",
    "Region",
    "Repository",
    "S3Config",
    "Secret",
    "Usage",
    "open_directory",
    "open_storage",
    "parse_backup_id",
    "storage_at",
]
