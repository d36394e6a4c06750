"""The repository's format, byte for byte: tests/golden/backup-repository-v2 is what README.md of backupnode/repository
describes. `python -m tests.golden.test_backup_repository` made it; it is never made again.

`encrypted-manifests`, made later by `make_encrypted`, is what encrypted repositories write since their manifests are
encrypted too; in `encrypted` only the chunks are.

Three backups: one whose chunks are stored as they are, which is also compared with what is written today, an
incremental on it, and one whose chunks are compressed, which is only read: another version of zstd may compress the
same bytes to others. And the same image in an encrypted repository.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
import struct
import zlib
from pathlib import Path

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from backupnode.repository import Origin, PackRepository, Secret, open_directory
from backupnode.repository.sealed import SealedKind, seal
from tests.conformance.test_repositories import read_all

GOLDEN = Path(__file__).parent / "backup-repository-v2"
CHUNK = 4096
NS = 1_000_000_000
SECRET = bytes(range(32))
PASSPHRASE = Secret(passphrase=b"correct horse")

# Beyond the first index page of 1024 chunks, so that there are two, and a page above them.
HOLE = 1100 * CHUNK
RAW = random.Random(1).randbytes(CHUNK) + bytes(HOLE) + random.Random(2).randbytes(CHUNK + 7)
CHANGED = RAW[: 2 * CHUNK] + b"changed".ljust(CHUNK, b".") + RAW[3 * CHUNK :]
COMPRESSED = b"still " * 2000 + bytes(CHUNK) + b"point"
IMAGES = {"s1": RAW, "s2": CHANGED, "s3": COMPRESSED}


def origin(snapshot: str, size: int, **more: object) -> Origin:
    number = int(snapshot[1:])
    uuid = "6f1c9e5a-0000-4000-8000-000000000001"
    return Origin("vol1", uuid, snapshot, size, (1_795_428_900 + number) * NS, "life", number, **more)  # type: ignore[arg-type]


async def write_raw(repository: PackRepository) -> str:
    writer = await repository.begin(origin("s1", len(RAW)))
    await writer.write(RAW)
    return (await writer.commit(received_bytes=len(RAW))).id


async def open_plain(folder: Path) -> PackRepository:
    """A new repository of the golden one's secret."""
    features: dict[str, list[str]] = {"read": [], "write": [], "collect": []}
    document = {
        "chunk_size": CHUNK,
        "created_ns": 1_795_428_900 * NS,
        "uuid": "59c5f026-0000-4000-8000-00000000000a",
        "features": features,
        "secret": SECRET.hex(),
    }
    folder.mkdir(exist_ok=True)
    (folder / "repository").write_bytes(seal(SealedKind.REPOSITORY, document, None))
    return await open_directory(folder, clock=lambda: 1_795_428_999 * NS)


def test_what_was_written_then_is_read_now(tmp_path: Path) -> None:
    async def main() -> None:
        for kind, secret in (("plain", None), ("encrypted", PASSPHRASE), ("encrypted-manifests", PASSPHRASE)):
            shutil.copytree(GOLDEN / kind, tmp_path / kind)
            repository = await open_directory(tmp_path / kind, secret=secret)
            listing = await repository.list()
            assert not listing.damaged
            assert [record.origin.snapshot for record in listing.backups] == ["s1", "s2", "s3"][: len(listing.backups)]
            for record in listing.backups:
                assert await read_all(repository, record.id) == IMAGES[record.origin.snapshot]
            await repository.close()

    asyncio.run(main())


def test_what_is_written_now_are_the_same_bytes(tmp_path: Path) -> None:
    async def main() -> None:
        repository = await open_plain(tmp_path / "again")
        await write_raw(repository)
        await repository.close()

    asyncio.run(main())
    assert (tmp_path / "again/repository").read_bytes() == (GOLDEN / "plain/repository").read_bytes()
    (pack,) = (tmp_path / "again/packs").iterdir()
    assert pack.read_bytes() == (GOLDEN / "plain/packs" / pack.name).read_bytes()


def test_the_tables_of_the_readme_suffice_to_read_a_backup() -> None:
    """A reader of its own, written from the tables alone."""
    folder = GOLDEN / "plain"
    secret = bytes.fromhex(json.loads(_payload(folder / "repository", b"SPRP", None))["secret"])
    keys = [
        blake3(secret, derive_key_context=f"stillpoint repository 2 {use}").digest()
        for use in ("chunk ids", "page ids", "manifests")
    ]
    blobs: dict[bytes, tuple[int, bytes]] = {}
    for path in (folder / "packs").iterdir():
        data = path.read_bytes()
        assert path.name == blake3(data).hexdigest()
        magic, version, reserved, crc = struct.unpack("<4sIQI", data[:20])
        assert (magic, version, reserved, crc) == (b"SPPK", 2, 0, zlib.crc32(data[:16]))
        position = 20
        while position < len(data):
            fields = struct.unpack("<4sBBBBII32s24sQII", data[position : position + 88])
            magic, version, kind, codec, encrypted, stored, plain, identity, session, counter, stored_crc, crc = fields
            payload = data[position + 88 : position + 88 + stored]
            assert (magic, version, encrypted, session, counter) == (b"SPBL", 2, 0, bytes(24), 0)
            assert stored_crc == zlib.crc32(payload) and crc == zlib.crc32(data[position : position + 84])
            payload = zstandard.ZstdDecompressor().decompress(payload) if codec else payload
            assert len(payload) == plain and identity == blake3(payload, key=keys[kind - 1]).digest()
            blobs[identity] = kind, payload
            position += 88 + stored
    seen = set()
    for path in (folder / "manifests").iterdir():
        manifest = json.loads(_payload(path, b"SPMF", keys[2]))
        assert manifest["id"] == path.name and manifest["chunk_size"] == CHUNK
        size, snapshot = manifest["origin"]["size"], manifest["origin"]["snapshot"]
        counts = [-(-size // CHUNK)]
        while counts[-1] > 1 or len(counts) == 1:
            counts.append(-(-counts[-1] // 1024))
        ids = [bytes.fromhex(manifest["root"])]
        for count in reversed(counts[:-1]):
            pages = [blobs[each][1] if any(each) else bytes(32 * 1024) for each in ids]
            ids = [page[at : at + 32] for page in pages for at in range(0, len(page), 32)][:count]
        chunks = [blobs[each][1] if any(each) else bytes(CHUNK) for each in ids]
        assert b"".join(chunks)[:size] == IMAGES[snapshot]
        seen.add(snapshot)
    assert seen == set(IMAGES)


def test_the_tables_of_the_readme_suffice_to_decrypt_a_manifest() -> None:
    folder = GOLDEN / "encrypted-manifests"
    (wrapped,) = json.loads(_payload(folder / "repository", b"SPRP", None))["wrapped_keys"]
    salt, nonce, sealed = (bytes.fromhex(wrapped[key]) for key in ("salt", "nonce", "wrapped"))
    assert PASSPHRASE.passphrase is not None
    wrapping = hashlib.scrypt(PASSPHRASE.passphrase, salt=salt, n=65536, r=8, p=1, maxmem=1 << 28, dklen=32)
    master = AESGCM(wrapping).decrypt(nonce, sealed, b"passphrase")
    key = blake3(master, derive_key_context="stillpoint repository 2 manifests").digest()
    (path,) = (folder / "manifests").iterdir()
    for name, magic in ((path, b"SPMF"), (folder / "notes" / path.name, b"SPNT")):
        payload = _payload(name, magic, key, version=3)
        session, counter = payload[:24], struct.unpack("<Q", payload[24:32])[0]
        subkey = HKDF(SHA256(), length=32, salt=session, info=b"stillpoint blobs").derive(master)
        plain = AESGCM(subkey).decrypt(counter.to_bytes(12, "big"), payload[32:], magic)
        assert json.loads(plain)["id"] == path.name


def _payload(path: Path, magic: bytes, key: bytes | None, *, version: int = 2) -> bytes:
    data = path.read_bytes()
    assert data[:4] == magic and struct.unpack("<I", data[4:8]) == (version,)
    assert struct.unpack("<I", data[44:48])[0] == zlib.crc32(data[:44])
    assert struct.unpack("<I", data[8:12])[0] == len(data) - 48
    assert data[12:44] == (blake3(data[48:], key=key) if key else blake3(data[48:])).digest()
    return data[48:]


async def make() -> None:
    GOLDEN.mkdir()
    plain = await open_plain(GOLDEN / "plain")
    base = await write_raw(plain)
    writer = await plain.begin(origin("s2", len(RAW), base=base))
    await writer.unchanged(2 * CHUNK)
    await writer.write(CHANGED[2 * CHUNK : 3 * CHUNK])
    await writer.unchanged(len(RAW) - 3 * CHUNK)
    await writer.commit(received_bytes=CHUNK)
    writer = await plain.begin(origin("s3", len(COMPRESSED)))
    await writer.write(COMPRESSED)
    await writer.commit(received_bytes=len(COMPRESSED))
    await plain.close()
    await make_encrypted("encrypted")
    (GOLDEN / "plain/index-cache").unlink()


async def make_encrypted(name: str) -> None:
    repository = await open_directory(GOLDEN / name, chunk_size=CHUNK, secret=PASSPHRASE)
    await write_raw(repository)
    await repository.close()
    for leftover in ("index-cache", "lock"):
        (GOLDEN / name / leftover).unlink()


if __name__ == "__main__":
    asyncio.run(make())
