"""What the standby remembers of a mirror: its folder in the state directory.

    mirrors/NAME/mirror.json   this record, replaced whole
    mirrors/NAME/disk.img      the mirror itself, byte i of the volume at byte i, unless devices were named
    mirrors/NAME/snapshots/    the snapshot engine's (standby/cow/README.md)
    replicas/NAME.meta         what the content is worth (stillpoint/replica/README.md)

A mirror exists when its `mirror.json` does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from stillpoint.document import read_document, write_document
from stillpoint.errors import DataCorrupt

# 2: sessions, generations and what the content is worth moved to replica.meta.
_VERSION = 2


@dataclass(slots=True)
class MirrorRecord:
    """Durable once `save` returned.

    mode: how the volume's writes are answered; for the day when this copy serves it.
    fallback: the snapshot taken before a resync that has not ended; or empty.
    given_up: the snapshot of what this copy held when its content was given up for another's; or empty.
    """

    folder: Path
    volume: str
    volume_uuid: str
    size: int  # bytes
    block_size: int  # bytes
    device_paths: list[str]
    created_ns: int
    mode: str = "sync"
    fallback: str = ""
    given_up: str = ""

    @property
    def file(self) -> Path:
        return self.folder / "mirror.json"

    def save(self) -> None:
        document = {**asdict(self), "version": _VERSION}
        del document["folder"]
        write_document(self.file, document)

    @classmethod
    def load(cls, folder: Path) -> MirrorRecord:
        """Raises NotFound, DataCorrupt."""
        document = read_document(folder / "mirror.json")
        if document.pop("version", None) != _VERSION:
            raise DataCorrupt(f"{folder / 'mirror.json'} is of another version")
        try:
            return cls(folder=folder, **document)
        except TypeError as error:
            raise DataCorrupt(f"{folder / 'mirror.json'}: {error}") from None
