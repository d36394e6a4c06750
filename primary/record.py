"""What a node remembers of a volume that it serves, or served: its folder in the state directory.

    volumes/NAME/volume.json   this record, replaced whole
    volumes/NAME/dirty.map     primary/dirty_map.py
    volumes/NAME/disk.img      the volume itself, unless devices were named
    replicas/NAME.meta         the copy's role and what its content is worth (stillpoint/replica/README.md)

A volume exists when its `volume.json` does; a folder without one is left over from a creation that did not finish.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from stillpoint.document import read_document, write_document
from stillpoint.errors import DataCorrupt

# 2: sessions moved to replica.meta.
_VERSION = 2


@dataclass(slots=True)
class VolumeRecord:
    """Durable once `save` returned."""

    folder: Path
    name: str
    uuid: str
    size: int  # bytes
    block_size: int  # bytes; unit of preservation on the standby
    mode: str
    device_paths: list[str]
    created_ns: int
    on_standby_loss: str = "continue"
    congestion: str = "block"
    resync_rate: int = 0  # bytes a second, at most; 0: as fast as it goes
    disk_failure: str = ""  # not empty: a flush failed, and this disk may lack what the mirror has

    @property
    def file(self) -> Path:
        return self.folder / "volume.json"

    def save(self) -> None:
        document = {**asdict(self), "version": _VERSION}
        del document["folder"]
        write_document(self.file, document)

    @classmethod
    def load(cls, folder: Path) -> VolumeRecord:
        """Raises NotFound, DataCorrupt."""
        document = read_document(folder / "volume.json")
        if document.pop("version", None) != _VERSION:
            raise DataCorrupt(f"{folder / 'volume.json'} is of another version")
        try:
            return cls(folder=folder, **document)
        except TypeError as error:
            raise DataCorrupt(f"{folder / 'volume.json'}: {error}") from None
