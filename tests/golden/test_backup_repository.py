"""The first repository format, byte for byte: tests/golden/backup-repository-v1 is what README.md of
backupnode/repository describes. `python -m tests.golden.test_backup_repository` made it; it is never made again.

Two backups: one whose chunks are stored as they are, which is also compared with what is written today, and one whose
chunks are compressed, which is only read: another version of zstd may compress the same bytes to others.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import struct
import zlib
from pathlib import Path

from blake3 import blake3

from backupnode.repository import BackupId, BackupRecord, Origin, open_directory
from backupnode.repository.codec import encode_chunk
from backupnode.repository.data_file import DataFile
from backupnode.repository.manifest import Manifest
from backupnode.repository.records import SealedKind, seal
from tests.conformance.test_repositories import read_all

GOLDEN = Path(__file__).parent / "backup-repository-v1"
CHUNK = 4096
NS = 1_000_000_000

RAW, COMPRESSED = BackupId("20261123T101502-vol1-0001"), BackupId("20261123T101503-vol1-0002")
# Beyond the first index page of 1024 chunks, so that there are two.
HOLE = 1100 * CHUNK
IMAGES = {
    RAW: random.Random(1).randbytes(CHUNK) + bytes(HOLE) + random.Random(2).randbytes(CHUNK + 7),
    COMPRESSED: b"still " * 2000 + bytes(CHUNK) + b"point",
}


def write(folder: Path, backup: BackupId) -> None:
    image = IMAGES[backup]
    file = DataFile(folder / f"{backup}.data", chunk_size=CHUNK, volume_size=len(image))
    chunks = (image[offset : offset + CHUNK] for offset in range(0, len(image), CHUNK))
    records = [encode_chunk(index, chunk, level=1) for index, chunk in enumerate(chunks)]
    file.append_chunks([record for record in records if record is not None])
    root = file.finish()
    file.close()
    record = BackupRecord(
        id=backup,
        origin=Origin("vol1", "6f1c9e5a-0000-4000-8000-000000000001", "s1", len(image), 1_795_428_902 * NS),
        finished_ns=1_795_428_903 * NS,
        duration_ns=NS,
        data_bytes=file.data_bytes,
        stored_bytes=file.length,
        received_bytes=len(image),
    )
    (folder / f"{backup}.manifest").write_bytes(Manifest(record, root).encode())


def write_small_files(folder: Path) -> None:
    repository = {"chunk_size": CHUNK, "created_ns": 1_795_428_900 * NS, "uuid": "59c5f026-0000-4000-8000-00000000000a"}
    (folder / "repository").write_bytes(seal(SealedKind.REPOSITORY, repository))
    verified = {"id": RAW, "verified_ns": 1_795_428_999 * NS}
    (folder / f"{RAW}.verified").write_bytes(seal(SealedKind.VERIFIED, verified))


def test_what_was_written_then_is_read_now(tmp_path: Path) -> None:
    async def main() -> None:
        shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
        repository = await open_directory(tmp_path)
        assert repository.uuid == "59c5f026-0000-4000-8000-00000000000a"
        listing = await repository.list()
        assert [record.id for record in listing.backups] == [RAW, COMPRESSED]
        assert [record.verified_ns for record in listing.backups] == [1_795_428_999 * NS, 0]
        for backup, image in IMAGES.items():
            assert await read_all(repository, backup) == image
        await repository.close()

    asyncio.run(main())


def test_what_is_written_now_are_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, RAW)
    write_small_files(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (GOLDEN / path.name).read_bytes(), path.name


def test_the_tables_of_the_readme_suffice_to_read_a_backup() -> None:
    """A reader of its own, written from the tables alone."""
    manifest = _unsealed(GOLDEN / f"{COMPRESSED}.manifest", b"SPMF")
    assert b'"root":{' in manifest
    data = (GOLDEN / f"{RAW}.data").read_bytes()
    magic, version, chunk_size, entries_per_page, volume_size, reserved, crc = struct.unpack("<4sIIIQII", data[:32])
    assert (magic, version, chunk_size, entries_per_page, reserved) == (b"SPDF", 1, CHUNK, 1024, 0)
    assert volume_size == len(IMAGES[RAW]) and crc == zlib.crc32(data[:28])
    position = 32
    kinds, image = [], bytearray(volume_size)
    while position < len(data):
        header = data[position : position + 64]
        fields = struct.unpack("<4sBBBBQII32sII", header)
        magic, version, kind, codec, reserved, number, stored, plain, digest, stored_crc, crc = fields
        payload = data[position + 64 : position + 64 + stored]
        assert (magic, version, codec, reserved) == (b"SPRC", 1, 0, 0) and crc == zlib.crc32(header[:60])
        assert plain == stored and stored_crc == zlib.crc32(payload) and digest == blake3(payload).digest()
        kinds.append(kind)
        if kind == 1:
            image[number * CHUNK : number * CHUNK + plain] = payload
        position += 64 + stored
    assert kinds == [1, 2, 1, 1, 2, 3]
    assert image == IMAGES[RAW]
    entries = list(struct.iter_unpack("<IIQ32s", payload))
    assert [(number, stored) for number, stored, _, _ in entries] == [(0, 48), (1, 96)]


def _unsealed(path: Path, magic: bytes) -> bytes:
    data = path.read_bytes()
    assert data[:4] == magic and struct.unpack("<I", data[4:8]) == (1,)
    assert struct.unpack("<I", data[44:48])[0] == zlib.crc32(data[:44])
    assert struct.unpack("<I", data[8:12])[0] == len(data) - 48
    assert data[12:44] == blake3(data[48:]).digest()
    return data[48:]


if __name__ == "__main__":
    GOLDEN.mkdir()
    write_small_files(GOLDEN)
    for each in IMAGES:
        write(GOLDEN, each)
