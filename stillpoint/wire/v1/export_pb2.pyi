from stillpoint.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReadSnapshotRequest(_message.Message):
    __slots__ = ("volume", "snapshot", "offset", "length", "message_size", "with_writes", "offsets", "lengths")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    WITH_WRITES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    volume: str
    snapshot: str
    offset: int
    length: int
    message_size: int
    with_writes: bool
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, volume: _Optional[str] = ..., snapshot: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., message_size: _Optional[int] = ..., with_writes: bool = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class ChangedExtentsRequest(_message.Message):
    __slots__ = ("volume", "snapshot", "base", "base_incarnation", "base_generation")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    BASE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BASE_GENERATION_FIELD_NUMBER: _ClassVar[int]
    volume: str
    snapshot: str
    base: str
    base_incarnation: str
    base_generation: int
    def __init__(self, volume: _Optional[str] = ..., snapshot: _Optional[str] = ..., base: _Optional[str] = ..., base_incarnation: _Optional[str] = ..., base_generation: _Optional[int] = ...) -> None: ...

class ChangedExtentsPart(_message.Message):
    __slots__ = ("known", "offsets", "lengths")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    known: bool
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, known: bool = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class WriteSnapshotPart(_message.Message):
    __slots__ = ("volume", "snapshot", "chunk")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    volume: str
    snapshot: str
    chunk: _common_pb2.Chunk
    def __init__(self, volume: _Optional[str] = ..., snapshot: _Optional[str] = ..., chunk: _Optional[_Union[_common_pb2.Chunk, _Mapping]] = ...) -> None: ...

class WriteSnapshotResponse(_message.Message):
    __slots__ = ("written_bytes",)
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    written_bytes: int
    def __init__(self, written_bytes: _Optional[int] = ...) -> None: ...

class DescribeSnapshotRequest(_message.Message):
    __slots__ = ("volume", "snapshot")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    volume: str
    snapshot: str
    def __init__(self, volume: _Optional[str] = ..., snapshot: _Optional[str] = ...) -> None: ...

class SnapshotDescription(_message.Message):
    __slots__ = ("volume", "snapshot", "snapshot_uuid", "volume_uuid", "size", "block_size", "created_ns", "incarnation", "generation")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_UUID_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    volume: str
    snapshot: str
    snapshot_uuid: str
    volume_uuid: str
    size: int
    block_size: int
    created_ns: int
    incarnation: str
    generation: int
    def __init__(self, volume: _Optional[str] = ..., snapshot: _Optional[str] = ..., snapshot_uuid: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., size: _Optional[int] = ..., block_size: _Optional[int] = ..., created_ns: _Optional[int] = ..., incarnation: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class ExportStatus(_message.Message):
    __slots__ = ("info", "nbd_clients", "streams", "read_bytes")
    INFO_FIELD_NUMBER: _ClassVar[int]
    NBD_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.NodeInfo
    nbd_clients: int
    streams: int
    read_bytes: int
    def __init__(self, info: _Optional[_Union[_common_pb2.NodeInfo, _Mapping]] = ..., nbd_clients: _Optional[int] = ..., streams: _Optional[int] = ..., read_bytes: _Optional[int] = ...) -> None: ...
