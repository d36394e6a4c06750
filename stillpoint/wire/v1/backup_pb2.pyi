from stillpoint.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunBackupRequest(_message.Message):
    __slots__ = ("volume", "snapshot", "full")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    volume: str
    snapshot: str
    full: bool
    def __init__(self, volume: _Optional[str] = ..., snapshot: _Optional[str] = ..., full: bool = ...) -> None: ...

class BackupEvent(_message.Message):
    __slots__ = ("progress", "backup")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    backup: Backup
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., backup: _Optional[_Union[Backup, _Mapping]] = ...) -> None: ...

class ListBackupsRequest(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    def __init__(self, volume: _Optional[str] = ...) -> None: ...

class BackupId(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Backup(_message.Message):
    __slots__ = ("id", "volume", "volume_uuid", "snapshot", "size", "snapshot_ns", "finished_ns", "data_bytes", "stored_bytes", "received_bytes", "duration_ns", "base", "verified_ns")
    ID_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_NS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_NS_FIELD_NUMBER: _ClassVar[int]
    DATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_NS_FIELD_NUMBER: _ClassVar[int]
    id: str
    volume: str
    volume_uuid: str
    snapshot: str
    size: int
    snapshot_ns: int
    finished_ns: int
    data_bytes: int
    stored_bytes: int
    received_bytes: int
    duration_ns: int
    base: str
    verified_ns: int
    def __init__(self, id: _Optional[str] = ..., volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., snapshot: _Optional[str] = ..., size: _Optional[int] = ..., snapshot_ns: _Optional[int] = ..., finished_ns: _Optional[int] = ..., data_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., duration_ns: _Optional[int] = ..., base: _Optional[str] = ..., verified_ns: _Optional[int] = ...) -> None: ...

class BackupList(_message.Message):
    __slots__ = ("backups", "damaged")
    BACKUPS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    backups: _containers.RepeatedCompositeFieldContainer[Backup]
    damaged: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, backups: _Optional[_Iterable[_Union[Backup, _Mapping]]] = ..., damaged: _Optional[_Iterable[str]] = ...) -> None: ...

class RestoreBackupRequest(_message.Message):
    __slots__ = ("id", "target", "force")
    ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    target: str
    force: bool
    def __init__(self, id: _Optional[str] = ..., target: _Optional[str] = ..., force: bool = ...) -> None: ...

class ReadBackupRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class BackupStatus(_message.Message):
    __slots__ = ("info", "repository", "repository_bytes", "backup_count", "standby_address", "nbd_address", "running")
    INFO_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BACKUP_COUNT_FIELD_NUMBER: _ClassVar[int]
    STANDBY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NBD_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.NodeInfo
    repository: str
    repository_bytes: int
    backup_count: int
    standby_address: str
    nbd_address: str
    running: int
    def __init__(self, info: _Optional[_Union[_common_pb2.NodeInfo, _Mapping]] = ..., repository: _Optional[str] = ..., repository_bytes: _Optional[int] = ..., backup_count: _Optional[int] = ..., standby_address: _Optional[str] = ..., nbd_address: _Optional[str] = ..., running: _Optional[int] = ...) -> None: ...
