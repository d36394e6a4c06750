from stillpoint.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MirrorState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MIRROR_STATE_UNSPECIFIED: _ClassVar[MirrorState]
    MIRROR_STATE_DISCONNECTED: _ClassVar[MirrorState]
    MIRROR_STATE_SYNCING: _ClassVar[MirrorState]
    MIRROR_STATE_IN_SYNC: _ClassVar[MirrorState]
    MIRROR_STATE_FAILED: _ClassVar[MirrorState]
    MIRROR_STATE_SERVED: _ClassVar[MirrorState]

class SnapshotState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SNAPSHOT_STATE_UNSPECIFIED: _ClassVar[SnapshotState]
    SNAPSHOT_STATE_CREATING: _ClassVar[SnapshotState]
    SNAPSHOT_STATE_ACTIVE: _ClassVar[SnapshotState]
    SNAPSHOT_STATE_INVALID: _ClassVar[SnapshotState]

class StoreKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STORE_KIND_UNSPECIFIED: _ClassVar[StoreKind]
    STORE_KIND_MEMORY: _ClassVar[StoreKind]
    STORE_KIND_FILE: _ClassVar[StoreKind]
MIRROR_STATE_UNSPECIFIED: MirrorState
MIRROR_STATE_DISCONNECTED: MirrorState
MIRROR_STATE_SYNCING: MirrorState
MIRROR_STATE_IN_SYNC: MirrorState
MIRROR_STATE_FAILED: MirrorState
MIRROR_STATE_SERVED: MirrorState
SNAPSHOT_STATE_UNSPECIFIED: SnapshotState
SNAPSHOT_STATE_CREATING: SnapshotState
SNAPSHOT_STATE_ACTIVE: SnapshotState
SNAPSHOT_STATE_INVALID: SnapshotState
STORE_KIND_UNSPECIFIED: StoreKind
STORE_KIND_MEMORY: StoreKind
STORE_KIND_FILE: StoreKind

class CreateMirrorRequest(_message.Message):
    __slots__ = ("volume", "volume_uuid", "size", "block_size", "device_paths")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_PATHS_FIELD_NUMBER: _ClassVar[int]
    volume: str
    volume_uuid: str
    size: int
    block_size: int
    device_paths: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., size: _Optional[int] = ..., block_size: _Optional[int] = ..., device_paths: _Optional[_Iterable[str]] = ...) -> None: ...

class ResizeMirrorRequest(_message.Message):
    __slots__ = ("volume", "volume_uuid", "size")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    volume: str
    volume_uuid: str
    size: int
    def __init__(self, volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class DeleteMirrorRequest(_message.Message):
    __slots__ = ("volume", "volume_uuid", "force")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    volume: str
    volume_uuid: str
    force: bool
    def __init__(self, volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., force: bool = ...) -> None: ...

class OpenLinkRequest(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "volume", "volume_uuid", "size", "replica", "dirty_bytes", "mode")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    DIRTY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    volume: str
    volume_uuid: str
    size: int
    replica: bytes
    dirty_bytes: int
    mode: str
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., size: _Optional[int] = ..., replica: _Optional[bytes] = ..., dirty_bytes: _Optional[int] = ..., mode: _Optional[str] = ...) -> None: ...

class OpenLinkResponse(_message.Message):
    __slots__ = ("protocol", "session", "replica", "dirty_bytes", "token", "data_link_port")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    DIRTY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DATA_LINK_PORT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    session: int
    replica: bytes
    dirty_bytes: int
    token: bytes
    data_link_port: int
    def __init__(self, protocol: _Optional[int] = ..., session: _Optional[int] = ..., replica: _Optional[bytes] = ..., dirty_bytes: _Optional[int] = ..., token: _Optional[bytes] = ..., data_link_port: _Optional[int] = ...) -> None: ...

class Frames(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: bytes
    def __init__(self, frames: _Optional[bytes] = ...) -> None: ...

class Mirror(_message.Message):
    __slots__ = ("volume", "volume_uuid", "size", "block_size", "device_paths", "state", "since_ns", "detail", "snapshot_count", "staged_bytes", "received_sequence", "applied_sequence", "flushed_sequence", "session")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_PATHS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SINCE_NS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FLUSHED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    volume: str
    volume_uuid: str
    size: int
    block_size: int
    device_paths: _containers.RepeatedScalarFieldContainer[str]
    state: MirrorState
    since_ns: int
    detail: str
    snapshot_count: int
    staged_bytes: int
    received_sequence: int
    applied_sequence: int
    flushed_sequence: int
    session: int
    def __init__(self, volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., size: _Optional[int] = ..., block_size: _Optional[int] = ..., device_paths: _Optional[_Iterable[str]] = ..., state: _Optional[_Union[MirrorState, str]] = ..., since_ns: _Optional[int] = ..., detail: _Optional[str] = ..., snapshot_count: _Optional[int] = ..., staged_bytes: _Optional[int] = ..., received_sequence: _Optional[int] = ..., applied_sequence: _Optional[int] = ..., flushed_sequence: _Optional[int] = ..., session: _Optional[int] = ...) -> None: ...

class CreateSnapshotRequest(_message.Message):
    __slots__ = ("volumes", "name", "store", "writable")
    VOLUMES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    volumes: _containers.RepeatedScalarFieldContainer[str]
    name: str
    store: str
    writable: bool
    def __init__(self, volumes: _Optional[_Iterable[str]] = ..., name: _Optional[str] = ..., store: _Optional[str] = ..., writable: bool = ...) -> None: ...

class ListSnapshotsRequest(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    def __init__(self, volume: _Optional[str] = ...) -> None: ...

class SnapshotName(_message.Message):
    __slots__ = ("volume", "name")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    name: str
    def __init__(self, volume: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class DeleteSnapshotRequest(_message.Message):
    __slots__ = ("volume", "name", "bookmark", "wait")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BOOKMARK_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    volume: str
    name: str
    bookmark: str
    wait: bool
    def __init__(self, volume: _Optional[str] = ..., name: _Optional[str] = ..., bookmark: _Optional[str] = ..., wait: bool = ...) -> None: ...

class ExportSnapshotRequest(_message.Message):
    __slots__ = ("volume", "name", "writable")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    volume: str
    name: str
    writable: bool
    def __init__(self, volume: _Optional[str] = ..., name: _Optional[str] = ..., writable: bool = ...) -> None: ...

class ProtectSnapshotRequest(_message.Message):
    __slots__ = ("volume", "name", "protected")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    volume: str
    name: str
    protected: bool
    def __init__(self, volume: _Optional[str] = ..., name: _Optional[str] = ..., protected: bool = ...) -> None: ...

class SetSnapshotPolicyRequest(_message.Message):
    __slots__ = ("volume", "expire", "count_max", "preserved_bytes_max", "defaults")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_FIELD_NUMBER: _ClassVar[int]
    COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    PRESERVED_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    volume: str
    expire: bool
    count_max: int
    preserved_bytes_max: int
    defaults: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, volume: _Optional[str] = ..., expire: bool = ..., count_max: _Optional[int] = ..., preserved_bytes_max: _Optional[int] = ..., defaults: _Optional[_Iterable[str]] = ...) -> None: ...

class ListSnapshotPoliciesRequest(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    def __init__(self, volume: _Optional[str] = ...) -> None: ...

class SnapshotPolicy(_message.Message):
    __slots__ = ("volume", "expire", "count_max", "preserved_bytes_max", "own", "count", "preserved_bytes")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_FIELD_NUMBER: _ClassVar[int]
    COUNT_MAX_FIELD_NUMBER: _ClassVar[int]
    PRESERVED_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    PRESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    volume: str
    expire: bool
    count_max: int
    preserved_bytes_max: int
    own: _containers.RepeatedScalarFieldContainer[str]
    count: int
    preserved_bytes: int
    def __init__(self, volume: _Optional[str] = ..., expire: bool = ..., count_max: _Optional[int] = ..., preserved_bytes_max: _Optional[int] = ..., own: _Optional[_Iterable[str]] = ..., count: _Optional[int] = ..., preserved_bytes: _Optional[int] = ...) -> None: ...

class SnapshotPolicyList(_message.Message):
    __slots__ = ("policies",)
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[SnapshotPolicy]
    def __init__(self, policies: _Optional[_Iterable[_Union[SnapshotPolicy, _Mapping]]] = ...) -> None: ...

class ListBookmarksRequest(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    def __init__(self, volume: _Optional[str] = ...) -> None: ...

class BookmarkName(_message.Message):
    __slots__ = ("volume", "name")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    name: str
    def __init__(self, volume: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class Bookmark(_message.Message):
    __slots__ = ("volume", "name", "incarnation", "generation", "created_ns", "snapshot_uuid")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_UUID_FIELD_NUMBER: _ClassVar[int]
    volume: str
    name: str
    incarnation: str
    generation: int
    created_ns: int
    snapshot_uuid: str
    def __init__(self, volume: _Optional[str] = ..., name: _Optional[str] = ..., incarnation: _Optional[str] = ..., generation: _Optional[int] = ..., created_ns: _Optional[int] = ..., snapshot_uuid: _Optional[str] = ...) -> None: ...

class BookmarkList(_message.Message):
    __slots__ = ("bookmarks",)
    BOOKMARKS_FIELD_NUMBER: _ClassVar[int]
    bookmarks: _containers.RepeatedCompositeFieldContainer[Bookmark]
    def __init__(self, bookmarks: _Optional[_Iterable[_Union[Bookmark, _Mapping]]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("volume", "name", "uuid", "state", "reason", "size", "created_ns", "generation", "store", "preserved_blocks", "preserved_bytes", "in_sync", "create_duration_ns", "block_size", "protected", "reclaimable_bytes", "readers", "shared_bytes", "reader_names", "writable")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    PRESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PRESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    CREATE_DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    RECLAIMABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READER_NAMES_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    volume: str
    name: str
    uuid: str
    state: SnapshotState
    reason: str
    size: int
    created_ns: int
    generation: int
    store: str
    preserved_blocks: int
    preserved_bytes: int
    in_sync: bool
    create_duration_ns: int
    block_size: int
    protected: bool
    reclaimable_bytes: int
    readers: int
    shared_bytes: int
    reader_names: _containers.RepeatedScalarFieldContainer[str]
    writable: bool
    def __init__(self, volume: _Optional[str] = ..., name: _Optional[str] = ..., uuid: _Optional[str] = ..., state: _Optional[_Union[SnapshotState, str]] = ..., reason: _Optional[str] = ..., size: _Optional[int] = ..., created_ns: _Optional[int] = ..., generation: _Optional[int] = ..., store: _Optional[str] = ..., preserved_blocks: _Optional[int] = ..., preserved_bytes: _Optional[int] = ..., in_sync: bool = ..., create_duration_ns: _Optional[int] = ..., block_size: _Optional[int] = ..., protected: bool = ..., reclaimable_bytes: _Optional[int] = ..., readers: _Optional[int] = ..., shared_bytes: _Optional[int] = ..., reader_names: _Optional[_Iterable[str]] = ..., writable: bool = ...) -> None: ...

class SnapshotList(_message.Message):
    __slots__ = ("snapshots",)
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[Snapshot]
    def __init__(self, snapshots: _Optional[_Iterable[_Union[Snapshot, _Mapping]]] = ...) -> None: ...

class CreateStoreRequest(_message.Message):
    __slots__ = ("name", "kind", "size", "paths", "map", "size_max")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    SIZE_MAX_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: StoreKind
    size: int
    paths: _containers.RepeatedScalarFieldContainer[str]
    map: str
    size_max: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[StoreKind, str]] = ..., size: _Optional[int] = ..., paths: _Optional[_Iterable[str]] = ..., map: _Optional[str] = ..., size_max: _Optional[int] = ...) -> None: ...

class ResizeStoreRequest(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Store(_message.Message):
    __slots__ = ("name", "uuid", "kind", "size", "used_bytes", "paths", "failure", "map", "size_max", "used_percent", "warning_percent", "reclaimable_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    SIZE_MAX_FIELD_NUMBER: _ClassVar[int]
    USED_PERCENT_FIELD_NUMBER: _ClassVar[int]
    WARNING_PERCENT_FIELD_NUMBER: _ClassVar[int]
    RECLAIMABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    uuid: str
    kind: StoreKind
    size: int
    used_bytes: int
    paths: _containers.RepeatedScalarFieldContainer[str]
    failure: str
    map: str
    size_max: int
    used_percent: int
    warning_percent: int
    reclaimable_bytes: int
    def __init__(self, name: _Optional[str] = ..., uuid: _Optional[str] = ..., kind: _Optional[_Union[StoreKind, str]] = ..., size: _Optional[int] = ..., used_bytes: _Optional[int] = ..., paths: _Optional[_Iterable[str]] = ..., failure: _Optional[str] = ..., map: _Optional[str] = ..., size_max: _Optional[int] = ..., used_percent: _Optional[int] = ..., warning_percent: _Optional[int] = ..., reclaimable_bytes: _Optional[int] = ...) -> None: ...

class StoreList(_message.Message):
    __slots__ = ("stores",)
    STORES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[Store]
    def __init__(self, stores: _Optional[_Iterable[_Union[Store, _Mapping]]] = ...) -> None: ...

class DeleteStoreRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class StandbyStatus(_message.Message):
    __slots__ = ("info", "mirrors", "stores", "export_pid", "export_grpc_address", "nbd_address", "received_bytes")
    INFO_FIELD_NUMBER: _ClassVar[int]
    MIRRORS_FIELD_NUMBER: _ClassVar[int]
    STORES_FIELD_NUMBER: _ClassVar[int]
    EXPORT_PID_FIELD_NUMBER: _ClassVar[int]
    EXPORT_GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NBD_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.NodeInfo
    mirrors: _containers.RepeatedCompositeFieldContainer[Mirror]
    stores: _containers.RepeatedCompositeFieldContainer[Store]
    export_pid: int
    export_grpc_address: str
    nbd_address: str
    received_bytes: int
    def __init__(self, info: _Optional[_Union[_common_pb2.NodeInfo, _Mapping]] = ..., mirrors: _Optional[_Iterable[_Union[Mirror, _Mapping]]] = ..., stores: _Optional[_Iterable[_Union[Store, _Mapping]]] = ..., export_pid: _Optional[int] = ..., export_grpc_address: _Optional[str] = ..., nbd_address: _Optional[str] = ..., received_bytes: _Optional[int] = ...) -> None: ...
