"""The manifest: the small file whose existence makes a backup exist. Format: README.md, "Manifest"."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from stillpoint.errors import DataCorrupt

from .backup_id import BackupId, parse_backup_id
from .interface import BackupRecord, Origin
from .records import DIGEST_SIZE, Entry, SealedKind, seal, unseal


@dataclass(frozen=True, slots=True)
class Manifest:
    """root: where the root of the index lies in the data file, and its digest, on which every other check rests."""

    record: BackupRecord
    root: Entry

    def encode(self) -> bytes:
        document = asdict(self.record)
        del document["verified_ns"]  # kept in a file of its own, because a manifest never changes
        document["root"] = {
            "position": self.root.position,
            "stored_length": self.root.stored_length,
            "digest": self.root.digest.hex(),
        }
        return seal(SealedKind.MANIFEST, document)

    @classmethod
    def decode(cls, data: bytes, *, backup: BackupId) -> Manifest:
        """Raises DataCorrupt, also when it is the manifest of another backup than `backup`."""
        document = unseal(SealedKind.MANIFEST, data)
        if document.get("id") != backup:
            raise DataCorrupt(f"is the manifest of {document.get('id')}")
        try:
            return _from_document(document)
        except (KeyError, TypeError, ValueError) as error:
            raise DataCorrupt(f"has contents that make no sense ({error!r})") from None


def _from_document(document: dict[str, Any]) -> Manifest:
    root = document.pop("root")
    digest = bytes.fromhex(root["digest"])
    if len(digest) != DIGEST_SIZE:
        raise ValueError("digest")
    origin = Origin(**document.pop("origin"))
    record = BackupRecord(id=parse_backup_id(document.pop("id")), origin=origin, **document)
    return Manifest(record, Entry(0, root["stored_length"], root["position"], digest))
