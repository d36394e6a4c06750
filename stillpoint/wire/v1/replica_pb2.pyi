from stillpoint.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_ROLE_UNSPECIFIED: _ClassVar[ReplicaRole]
    REPLICA_ROLE_PRIMARY: _ClassVar[ReplicaRole]
    REPLICA_ROLE_STANDBY: _ClassVar[ReplicaRole]
REPLICA_ROLE_UNSPECIFIED: ReplicaRole
REPLICA_ROLE_PRIMARY: ReplicaRole
REPLICA_ROLE_STANDBY: ReplicaRole

class Replica(_message.Message):
    __slots__ = ("volume", "volume_uuid", "node", "role", "epoch", "generation", "up_to_date", "consistent", "detail", "fallback", "size")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UP_TO_DATE_FIELD_NUMBER: _ClassVar[int]
    CONSISTENT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    volume: str
    volume_uuid: str
    node: str
    role: ReplicaRole
    epoch: int
    generation: str
    up_to_date: bool
    consistent: bool
    detail: str
    fallback: str
    size: int
    def __init__(self, volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., node: _Optional[str] = ..., role: _Optional[_Union[ReplicaRole, str]] = ..., epoch: _Optional[int] = ..., generation: _Optional[str] = ..., up_to_date: bool = ..., consistent: bool = ..., detail: _Optional[str] = ..., fallback: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class ReplicaList(_message.Message):
    __slots__ = ("node", "replicas")
    NODE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    node: str
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, node: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("volume", "force", "mode", "snapshot")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    volume: str
    force: bool
    mode: str
    snapshot: str
    def __init__(self, volume: _Optional[str] = ..., force: bool = ..., mode: _Optional[str] = ..., snapshot: _Optional[str] = ...) -> None: ...

class PromoteResponse(_message.Message):
    __slots__ = ("replica", "duration_ns", "nbd_address")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    NBD_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    duration_ns: int
    nbd_address: str
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ..., duration_ns: _Optional[int] = ..., nbd_address: _Optional[str] = ...) -> None: ...

class SwitchOverRequest(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    def __init__(self, volume: _Optional[str] = ...) -> None: ...

class RejoinRequest(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: str
    def __init__(self, volume: _Optional[str] = ...) -> None: ...

class OutrankRequest(_message.Message):
    __slots__ = ("volume", "epoch")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    volume: str
    epoch: int
    def __init__(self, volume: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class GiveUpRequest(_message.Message):
    __slots__ = ("volume", "winner")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    WINNER_FIELD_NUMBER: _ClassVar[int]
    volume: str
    winner: str
    def __init__(self, volume: _Optional[str] = ..., winner: _Optional[str] = ...) -> None: ...

class GiveUpResponse(_message.Message):
    __slots__ = ("replica", "snapshot")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    snapshot: str
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ..., snapshot: _Optional[str] = ...) -> None: ...

class ListDirtyRequest(_message.Message):
    __slots__ = ("volume", "volume_uuid")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_UUID_FIELD_NUMBER: _ClassVar[int]
    volume: str
    volume_uuid: str
    def __init__(self, volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ...) -> None: ...

class DirtyExtents(_message.Message):
    __slots__ = ("offsets", "lengths")
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...
