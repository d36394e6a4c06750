"""Where a repository is, as an operator writes it: a folder, or `s3://BUCKET/PREFIX`."""

from __future__ import annotations

from pathlib import Path

from stillpoint.errors import ConfigError

from .folder import DirectoryStorage
from .object_storage import SCHEME, ObjectStorage
from .s3_config import S3Config
from .storage import Storage


def storage_at(location: str, s3: S3Config | None = None) -> Storage:
    """Nothing is read or made yet. s3: of a bucket. Raises ConfigError for what is neither."""
    if location.startswith(SCHEME):
        return ObjectStorage.connect(location, s3 or S3Config())
    if "://" in location or not location:
        raise ConfigError(f"{location!r} is not where a repository can be; name a folder, or s3://BUCKET/PREFIX")
    return DirectoryStorage(Path(location))
