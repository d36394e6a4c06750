"""Backup repositories behind one promise (`interface.Repository`). Formats: README.md."""

from .backup_id import BackupId, parse_backup_id
from .directory import DirectoryRepository, open_directory
from .interface import BackupReader, BackupRecord, BackupWriter, Listing, Origin, Repository

__all__ = [
    "BackupId",
    "BackupReader",
    "BackupRecord",
    "BackupWriter",
    "DirectoryRepository",
    "Listing",
    "Origin",
    "Repository",
    "open_directory",
    "parse_backup_id",
]
