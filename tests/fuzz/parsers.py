"""The parsers of what disks hold and operators write; with those of `wire_parsers.py` they are all of them."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import yaml

from backupnode.repository import blobs, parse_backup_id
from backupnode.repository.blobs import BlobKind
from backupnode.repository.folder import DirectoryStorage
from backupnode.repository.format import read_format
from backupnode.repository.keys import Keys
from backupnode.repository.manifest import Manifest
from backupnode.repository.sealed import SEAL_HEADER_SIZE, SealedKind, seal
from primary.config import PrimaryConfig
from primary.dirty_map import CHUNK_SIZE, DirtyMap
from primary.intent_log import IntentLog
from primary.record import VolumeRecord
from standby.cow import catalog, record_log, store_directory
from standby.cow.association_forms import open_map
from standby.cow.catalog import Catalog
from standby.cow.shared_header import FILE_SIZE, TABLE_OFFSET, SharedHeader
from standby.record import MirrorRecord
from stillpoint.config import Address, load_config, parse_size
from stillpoint.errors import StillpointError
from stillpoint.nbd.uri import NbdUri
from stillpoint.replica import ReplicaFile
from stillpoint.security.roles import identity_in
from tests.fuzz.parser import Parser
from tests.fuzz.wire_parsers import WIRE_PARSERS
from tests.golden.test_replica_metadata import STATE as REPLICA_STATE
from tests.support.listing import from_listing

GOLDEN: Final = Path(__file__).resolve().parents[1] / "golden"
_SCRATCH: Final = tempfile.TemporaryDirectory(
    prefix="stillpoint-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
)
FOLDER: Final = Path(_SCRATCH.name)


def _crc_at(offset: int, *, over: Callable[[bytearray], bytes], least: int) -> Callable[[bytes], bytes]:
    """Repairs a little-endian CRC-32 at `offset` of what `over` names, in inputs of at least `least` bytes."""

    def repair(data: bytes) -> bytes:
        fixed = bytearray(data)
        if len(fixed) >= least:
            struct.pack_into("<I", fixed, offset, zlib.crc32(over(fixed)))
        return bytes(fixed)

    return repair


def _without(offset: int) -> Callable[[bytearray], bytes]:
    return lambda data: bytes(data[:offset]) + bytes(4) + bytes(data[offset + 4 :])


# --- files


def _file(name: str) -> Path:
    return FOLDER / name


def _from_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    def feed(data: bytes) -> None:
        path = _file(name)
        path.write_bytes(data)
        read(path)

    return feed


def _read_catalog(path: Path) -> None:
    for event, fields in Catalog.open(path).state.records():
        assert catalog.encode_record(event, fields, sequence=0)


def _read_map(path: Path) -> None:
    # Not its entries: they are this run's own memory, made anew at every start.
    open_map(path).close()


def _read_header(path: Path) -> None:
    header = SharedHeader.open(path)
    try:
        header.read()
    finally:
        header.close()


def _read_dirty_map(path: Path) -> None:
    dirty = DirtyMap(path, 5 * CHUNK_SIZE, create=False)
    dirty.close(clean=False)


def _read_intent(path: Path) -> None:
    log = IntentLog(path)
    log.suspects(1 << 30)
    log.close()


def _in_folder(name: str, load: Callable[[Path], object]) -> Callable[[bytes], None]:
    folder = FOLDER / f"folder-{name}"
    folder.mkdir(exist_ok=True)
    return _from_file(f"folder-{name}/{name}", lambda path: load(folder))


def _shared_header(*, state: int) -> bytes:
    data = bytearray((GOLDEN / "cow/shared_header.bin").read_bytes().ljust(FILE_SIZE, b"\0"))
    struct.pack_into("<I", data, TABLE_OFFSET + 4, state)
    return bytes(data)


def _volume_record() -> bytes:
    record = VolumeRecord(FOLDER, "v", "u", 65536, 65536, "sync", ["/x"], 1)
    record.save()
    return record.file.read_bytes()


def _mirror_record() -> bytes:
    record = MirrorRecord(FOLDER, "v", "u", 65536, 65536, ["/x"], 1)
    record.save()
    return record.file.read_bytes()


def _replica_metadata() -> bytes:
    path = _file("made.meta")
    ReplicaFile.create(path, REPLICA_STATE).close()
    return path.read_bytes()


def _dirty_map() -> bytes:
    path = _file("made.map")
    dirty = DirtyMap(path, 5 * CHUNK_SIZE, create=True)
    dirty.mark(CHUNK_SIZE, 1)
    dirty.close(clean=False)
    return path.read_bytes()


def _intent_log() -> bytes:
    path = _file("made.intent")
    log = IntentLog(path)
    log.append([0, 5, 77])
    log.append([1])
    log.close()
    return path.read_bytes()


def _repaired_catalog(data: bytes) -> bytes:
    fixed, at = bytearray(data), 0
    while at + catalog.HEADER.size <= len(fixed):
        length = int.from_bytes(fixed[at + 8 : at + 12], "little")
        if not catalog.HEADER.size <= length <= len(fixed) - at:
            break
        record = bytes(fixed[at : at + 12]) + bytes(4) + bytes(fixed[at + 16 : at + length])
        struct.pack_into("<I", fixed, at + 12, zlib.crc32(record))
        at += length
    return bytes(fixed)


def _repaired_slots(at: int, crc_at: int) -> Callable[[bytes], bytes]:
    """Files of slots of 4096 bytes whose checksum is of what stands before it."""

    def repair(data: bytes) -> bytes:
        fixed = bytearray(data)
        for start in range(at, len(fixed) - 4095, 4096):
            struct.pack_into("<I", fixed, start + crc_at, zlib.crc32(fixed[start : start + crc_at]))
        return bytes(fixed)

    return repair


def _repaired_definitions(data: bytes) -> bytes:
    try:
        document = json.loads(data)
        content = json.dumps(document["content"], sort_keys=True, separators=(",", ":"))
        document["crc"] = zlib.crc32(content.encode())
        return json.dumps(document).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return data


_PLAIN: Final = GOLDEN / "backup-repository-v2/plain"
_MANIFEST_KEY: Final = bytes(32)
_MANIFEST: Final = next((_PLAIN / "manifests").iterdir())


def _resealed(kind: bytes, key: bytes | None) -> Callable[[bytes], bytes]:
    """The contents as they are, under a seal that fits: what a keyless attacker can do to `repository` itself."""

    def repair(data: bytes) -> bytes:
        payload = data[SEAL_HEADER_SIZE:]
        sealed = seal(kind, {}, key)  # for its header's form
        head = struct.pack("<4sII32s", kind, int.from_bytes(sealed[4:8], "little"), len(payload), _digest(payload, key))
        return head + struct.pack("<I", zlib.crc32(head)) + payload

    return repair


def _digest(payload: bytes, key: bytes | None) -> bytes:
    from blake3 import blake3

    return blake3(payload).digest() if key is None else blake3(payload, key=key).digest()


def _manifest_seed() -> bytes:
    payload = _MANIFEST.read_bytes()[SEAL_HEADER_SIZE:]
    return _resealed(SealedKind.MANIFEST, _MANIFEST_KEY)(bytes(SEAL_HEADER_SIZE) + payload)


def feed_manifest(data: bytes) -> None:
    Manifest.decode(data, backup=parse_backup_id(_MANIFEST.name), key=_MANIFEST_KEY)


def _blob_seeds() -> list[bytes]:
    pack = next((_PLAIN / "packs").iterdir()).read_bytes()
    return [pack[20 : 20 + blobs.decode_header(pack[20:]).blob_size]]


def feed_blob(data: bytes) -> None:
    header = blobs.decode_header(data)
    blobs.decode(data, BlobKind(header.kind), header.id, _KEYS)


_KEYS: Final = Keys.of(bytes(range(32)), encrypted=False)


def _repaired_blob(data: bytes) -> bytes:
    fixed = bytearray(data)
    if len(fixed) >= 88:
        struct.pack_into("<I", fixed, 80, zlib.crc32(fixed[88:]))
        struct.pack_into("<I", fixed, 84, zlib.crc32(fixed[:84]))
    return bytes(fixed)


# --- words of operators and peers


def feed_words(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for parse in (parse_size, Address.parse, NbdUri.parse, parse_backup_id):
        with contextlib.suppress(StillpointError):
            parse(text)
    identity_in([text])


_CONFIG: Final = yaml.safe_dump(
    {
        "state_dir": "/x",
        "listen": {"grpc": "127.0.0.1:1", "nbd": "[::1]:2"},
        "limits": {"nbd_connections": 3, "request_memory_bytes": "48MiB"},
        "quiesce": {"limit_s": 1.5, "hooks": [{"volume": "v", "freeze": ["a"], "thaw": ["b"]}]},
    }
).encode()


def _golden(folder: str, *names: str) -> list[bytes]:
    return [(GOLDEN / folder / name).read_bytes() for name in names]


def _maps() -> Iterator[bytes]:
    for form in ("hash", "ordered", "unordered"):
        yield from_listing((GOLDEN / f"cow/{form}_map.txt").read_bytes())


_FORMAT_FOLDER: Final = FOLDER / "folder-repository"
_FORMAT_FOLDER.mkdir(exist_ok=True)

PARSERS: Final[Mapping[str, Parser]] = {
    **WIRE_PARSERS,
    "store superblock": Parser(
        _golden("cow", "superblock.bin"),
        lambda data: record_log.decode_superblock(data.ljust(4096, b"\0")),
        repaired=_crc_at(12, over=_without(12), least=4096),
    ),
    "store batch": Parser(
        _golden("cow", "batch.bin"),
        lambda data: record_log.decode_batch(data, sequence=42, superblock_sequence=7),
        repaired=_crc_at(12, over=_without(12), least=72),
    ),
    "catalog": Parser(
        _golden("cow", "catalog.bin", "catalog-1.bin"),
        _from_file("catalog.log", _read_catalog),
        repaired=_repaired_catalog,
    ),
    "association maps": Parser(list(_maps()), _from_file("map", _read_map), refusals=(StillpointError, OSError)),
    "shared header": Parser(
        [_shared_header(state=3)],
        _from_file("header", _read_header),
        refusals=(StillpointError, OSError),
    ),
    "list of stores": Parser(
        _golden("cow", "stores.json", "stores-1.json"),
        _from_file("stores.json", store_directory.read_definitions),
        repaired=_repaired_definitions,
    ),
    "dirty map": Parser(
        [_dirty_map()],
        _from_file("dirty.map", _read_dirty_map),
        repaired=_crc_at(68, over=lambda data: bytes(data[:68]), least=72),
    ),
    "intent log": Parser([_intent_log()], _from_file("intent.log", _read_intent)),
    "volume.json": Parser(
        [_volume_record()],
        _in_folder("volume.json", VolumeRecord.load),
    ),
    "mirror.json": Parser([_mirror_record()], _in_folder("mirror.json", MirrorRecord.load)),
    "replica metadata": Parser(
        [_replica_metadata()],
        _from_file("replica.meta", lambda path: ReplicaFile.open(path).close()),
        repaired=_repaired_slots(0, 4092),
    ),
    "repository": Parser(
        [(_PLAIN / "repository").read_bytes()],
        _from_file("folder-repository/repository", lambda path: read_format(DirectoryStorage(_FORMAT_FOLDER), None)),
        repaired=_resealed(SealedKind.REPOSITORY, None),
    ),
    "manifest": Parser([_manifest_seed()], feed_manifest, repaired=_resealed(SealedKind.MANIFEST, _MANIFEST_KEY)),
    "blobs of a pack": Parser(_blob_seeds(), feed_blob, repaired=_repaired_blob),
    "configuration": Parser([_CONFIG], _from_file("node.yaml", lambda path: load_config(path, PrimaryConfig))),
    "words": Parser(
        [b"64MiB", b"[::1]:7410", b"nbd://host:10809/vol1", b"nbd+unix:///x?socket=/a", b"stillpoint:data:node-a"],
        feed_words,
    ),
}


def _nonsense_catalog() -> bytes:
    good = catalog.encode_record(catalog.Event.VOLUME, {"name": "v", "size": 1}, sequence=0)
    return good + catalog.encode_record(catalog.Event.SNAPSHOT_DELETED, {"generation": 7}, sequence=1)


def _format_file(**changed: object) -> bytes:
    document = json.loads((_PLAIN / "repository").read_bytes()[SEAL_HEADER_SIZE:])
    return seal(SealedKind.REPOSITORY, document | changed, None)


# Each of these once ended in something else than a refusal.
_DEEP: Final = b"[" * 100_000
DEFECTS: Final[Mapping[str, tuple[str, bytes]]] = {
    "a catalog that deletes what is not there": ("catalog", _nonsense_catalog()),
    "a list of stores nested too deep": ("list of stores", _DEEP),
    "volume.json nested too deep": ("volume.json", _DEEP),
    "a map cut off in its header": ("association maps", next(_maps())[:1000]),
    "a shared header with an unknown state": ("shared header", _shared_header(state=0xFF)),
    "a repository of chunks of 1 TiB": ("repository", _format_file(chunk_size=1 << 40)),
    "a repository with half a secret": ("repository", _format_file(secret="00" * 16)),
    "a repository that is a list": (
        "repository",
        _resealed(SealedKind.REPOSITORY, None)(bytes(SEAL_HEADER_SIZE) + b"[1]"),
    ),
    "a repository nested too deep": (
        "repository",
        _resealed(SealedKind.REPOSITORY, None)(bytes(SEAL_HEADER_SIZE) + _DEEP),
    ),
}
