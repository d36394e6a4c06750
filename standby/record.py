"""What the standby remembers of a mirror: its folder in the state directory.

    mirrors/NAME/mirror.json   this record, replaced whole
    mirrors/NAME/disk.img      the mirror itself, byte i of the volume at byte i, unless devices were named
    mirrors/NAME/snapshots/    the snapshot engine's (standby/cow/README.md)

A mirror exists when its `mirror.json` does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from stillpoint.document import read_document, write_document
from stillpoint.errors import DataCorrupt

_VERSION = 1


@dataclass(slots=True)
class MirrorRecord:
    """Durable once `save` returned.

    epoch, session: the fence; frames of any other session are refused. Raised before a token is given out.
    adopted_session: the last session whose link was taken; frames of it may be in the mirror.
    blank: no frame ever changed the mirror, so it reads as zeroes.
    consistent: the mirror is a state that the volume had; false from RESYNC_BEGIN to RESYNC_END.
    """

    folder: Path
    volume: str
    volume_uuid: str
    mirror_uuid: str
    size: int  # bytes
    block_size: int  # bytes
    device_paths: list[str]
    created_ns: int
    epoch: int = 0
    session: int = 0
    adopted_session: int = 0
    blank: bool = True
    consistent: bool = False

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
