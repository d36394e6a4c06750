"""The manifest: the small file whose existence makes a backup exist. Format: README.md, "Manifest"."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from stillpoint.errors import DataCorrupt

from .backup_id import BackupId, parse_backup_id
from .blobs import ID_SIZE, ChunkId
from .interface import BackupRecord, Origin
from .keys import Cipher
from .sealed import SealedKind, seal, unseal

# Fields of a record that are kept in a note, because a manifest never changes.
NOTED: Final = ("verified_ns", "protected", "tested_ns", "test_error")


@dataclass(frozen=True, slots=True)
class Manifest:
    """root: the id of the top of the index, on which every other check rests."""

    record: BackupRecord
    chunk_size: int
    root: ChunkId

    def encode(self, key: bytes, cipher: Cipher | None = None) -> bytes:
        return seal(SealedKind.MANIFEST, self.document(), key, cipher)

    def document(self) -> dict[str, Any]:
        document = asdict(self.record)
        for name in NOTED:
            del document[name]
        document["chunk_size"] = self.chunk_size
        document["root"] = self.root.hex()
        return document

    @classmethod
    def decode(cls, data: bytes, *, backup: BackupId, key: bytes, cipher: Cipher | None = None) -> Manifest:
        """Raises DataCorrupt, also when it is the manifest of another backup than `backup`."""
        document = unseal(SealedKind.MANIFEST, data, key, cipher)
        if document.get("id") != backup:
            raise DataCorrupt(f"is the manifest of {document.get('id')}")
        try:
            return cls.from_document(document)
        except (KeyError, TypeError, ValueError) as error:
            raise DataCorrupt(f"has contents that make no sense ({error!r})") from None

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Manifest:
        """Takes the document apart. Raises KeyError, TypeError, ValueError for one that makes no sense."""
        root = bytes.fromhex(document.pop("root"))
        if len(root) != ID_SIZE:
            raise ValueError("root")
        chunk_size = int(document.pop("chunk_size"))
        origin = Origin(**document.pop("origin"))
        record = BackupRecord(id=parse_backup_id(document.pop("id")), origin=origin, **document)
        return cls(record, chunk_size, ChunkId(root))
