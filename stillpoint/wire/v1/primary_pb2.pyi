from stillpoint.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AckMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACK_MODE_UNSPECIFIED: _ClassVar[AckMode]
    ACK_MODE_ASYNC: _ClassVar[AckMode]
    ACK_MODE_SYNC: _ClassVar[AckMode]
    ACK_MODE_DURABLE: _ClassVar[AckMode]

class PairState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAIR_STATE_UNSPECIFIED: _ClassVar[PairState]
    PAIR_STATE_DISCONNECTED: _ClassVar[PairState]
    PAIR_STATE_SYNCING: _ClassVar[PairState]
    PAIR_STATE_IN_SYNC: _ClassVar[PairState]
    PAIR_STATE_SPLIT_BRAIN: _ClassVar[PairState]

class OnStandbyLoss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_STANDBY_LOSS_UNSPECIFIED: _ClassVar[OnStandbyLoss]
    ON_STANDBY_LOSS_CONTINUE: _ClassVar[OnStandbyLoss]
    ON_STANDBY_LOSS_SUSPEND: _ClassVar[OnStandbyLoss]
    ON_STANDBY_LOSS_ERROR: _ClassVar[OnStandbyLoss]

class Congestion(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONGESTION_UNSPECIFIED: _ClassVar[Congestion]
    CONGESTION_BLOCK: _ClassVar[Congestion]
    CONGESTION_DETACH: _ClassVar[Congestion]
ACK_MODE_UNSPECIFIED: AckMode
ACK_MODE_ASYNC: AckMode
ACK_MODE_SYNC: AckMode
ACK_MODE_DURABLE: AckMode
PAIR_STATE_UNSPECIFIED: PairState
PAIR_STATE_DISCONNECTED: PairState
PAIR_STATE_SYNCING: PairState
PAIR_STATE_IN_SYNC: PairState
PAIR_STATE_SPLIT_BRAIN: PairState
ON_STANDBY_LOSS_UNSPECIFIED: OnStandbyLoss
ON_STANDBY_LOSS_CONTINUE: OnStandbyLoss
ON_STANDBY_LOSS_SUSPEND: OnStandbyLoss
ON_STANDBY_LOSS_ERROR: OnStandbyLoss
CONGESTION_UNSPECIFIED: Congestion
CONGESTION_BLOCK: Congestion
CONGESTION_DETACH: Congestion

class SetVolumeRequest(_message.Message):
    __slots__ = ("name", "mode", "on_standby_loss", "congestion", "resync_rate")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ON_STANDBY_LOSS_FIELD_NUMBER: _ClassVar[int]
    CONGESTION_FIELD_NUMBER: _ClassVar[int]
    RESYNC_RATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    mode: AckMode
    on_standby_loss: OnStandbyLoss
    congestion: Congestion
    resync_rate: int
    def __init__(self, name: _Optional[str] = ..., mode: _Optional[_Union[AckMode, str]] = ..., on_standby_loss: _Optional[_Union[OnStandbyLoss, str]] = ..., congestion: _Optional[_Union[Congestion, str]] = ..., resync_rate: _Optional[int] = ...) -> None: ...

class ResumeVolumeRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ResyncVolumeRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CreateVolumeRequest(_message.Message):
    __slots__ = ("name", "size", "block_size", "device_paths", "mirror_device_paths", "mode")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_PATHS_FIELD_NUMBER: _ClassVar[int]
    MIRROR_DEVICE_PATHS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    block_size: int
    device_paths: _containers.RepeatedScalarFieldContainer[str]
    mirror_device_paths: _containers.RepeatedScalarFieldContainer[str]
    mode: AckMode
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., block_size: _Optional[int] = ..., device_paths: _Optional[_Iterable[str]] = ..., mirror_device_paths: _Optional[_Iterable[str]] = ..., mode: _Optional[_Union[AckMode, str]] = ...) -> None: ...

class GetVolumeRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ResizeVolumeRequest(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class DeleteVolumeRequest(_message.Message):
    __slots__ = ("name", "force")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    force: bool
    def __init__(self, name: _Optional[str] = ..., force: bool = ...) -> None: ...

class FreezeRequest(_message.Message):
    __slots__ = ("volumes", "limit_ms")
    VOLUMES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_MS_FIELD_NUMBER: _ClassVar[int]
    volumes: _containers.RepeatedScalarFieldContainer[str]
    limit_ms: int
    def __init__(self, volumes: _Optional[_Iterable[str]] = ..., limit_ms: _Optional[int] = ...) -> None: ...

class FreezeId(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Pair(_message.Message):
    __slots__ = ("state", "since_ns", "dirty_bytes", "unflushed_bytes", "in_flight_bytes", "resync_done_bytes", "resync_total_bytes", "resync_rate", "carrier", "detail", "session", "verified_ns", "mismatch_bytes", "lag_ms")
    STATE_FIELD_NUMBER: _ClassVar[int]
    SINCE_NS_FIELD_NUMBER: _ClassVar[int]
    DIRTY_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNFLUSHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESYNC_DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESYNC_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESYNC_RATE_FIELD_NUMBER: _ClassVar[int]
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_NS_FIELD_NUMBER: _ClassVar[int]
    MISMATCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAG_MS_FIELD_NUMBER: _ClassVar[int]
    state: PairState
    since_ns: int
    dirty_bytes: int
    unflushed_bytes: int
    in_flight_bytes: int
    resync_done_bytes: int
    resync_total_bytes: int
    resync_rate: int
    carrier: str
    detail: str
    session: int
    verified_ns: int
    mismatch_bytes: int
    lag_ms: int
    def __init__(self, state: _Optional[_Union[PairState, str]] = ..., since_ns: _Optional[int] = ..., dirty_bytes: _Optional[int] = ..., unflushed_bytes: _Optional[int] = ..., in_flight_bytes: _Optional[int] = ..., resync_done_bytes: _Optional[int] = ..., resync_total_bytes: _Optional[int] = ..., resync_rate: _Optional[int] = ..., carrier: _Optional[str] = ..., detail: _Optional[str] = ..., session: _Optional[int] = ..., verified_ns: _Optional[int] = ..., mismatch_bytes: _Optional[int] = ..., lag_ms: _Optional[int] = ...) -> None: ...

class Volume(_message.Message):
    __slots__ = ("name", "uuid", "size", "block_size", "mode", "device_paths", "pair", "clients", "created_ns", "read_bytes", "written_bytes", "failure", "on_standby_loss", "congestion", "resync_rate", "suspended", "refusing", "withheld_count", "hot_bytes", "crash_resync_bytes_max", "read_failures", "repaired_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_PATHS_FIELD_NUMBER: _ClassVar[int]
    PAIR_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ON_STANDBY_LOSS_FIELD_NUMBER: _ClassVar[int]
    CONGESTION_FIELD_NUMBER: _ClassVar[int]
    RESYNC_RATE_FIELD_NUMBER: _ClassVar[int]
    SUSPENDED_FIELD_NUMBER: _ClassVar[int]
    REFUSING_FIELD_NUMBER: _ClassVar[int]
    WITHHELD_COUNT_FIELD_NUMBER: _ClassVar[int]
    HOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CRASH_RESYNC_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    READ_FAILURES_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    uuid: str
    size: int
    block_size: int
    mode: AckMode
    device_paths: _containers.RepeatedScalarFieldContainer[str]
    pair: Pair
    clients: int
    created_ns: int
    read_bytes: int
    written_bytes: int
    failure: str
    on_standby_loss: OnStandbyLoss
    congestion: Congestion
    resync_rate: int
    suspended: _containers.RepeatedScalarFieldContainer[str]
    refusing: bool
    withheld_count: int
    hot_bytes: int
    crash_resync_bytes_max: int
    read_failures: int
    repaired_bytes: int
    def __init__(self, name: _Optional[str] = ..., uuid: _Optional[str] = ..., size: _Optional[int] = ..., block_size: _Optional[int] = ..., mode: _Optional[_Union[AckMode, str]] = ..., device_paths: _Optional[_Iterable[str]] = ..., pair: _Optional[_Union[Pair, _Mapping]] = ..., clients: _Optional[int] = ..., created_ns: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., failure: _Optional[str] = ..., on_standby_loss: _Optional[_Union[OnStandbyLoss, str]] = ..., congestion: _Optional[_Union[Congestion, str]] = ..., resync_rate: _Optional[int] = ..., suspended: _Optional[_Iterable[str]] = ..., refusing: bool = ..., withheld_count: _Optional[int] = ..., hot_bytes: _Optional[int] = ..., crash_resync_bytes_max: _Optional[int] = ..., read_failures: _Optional[int] = ..., repaired_bytes: _Optional[int] = ...) -> None: ...

class VerifyMirrorRequest(_message.Message):
    __slots__ = ("volume", "repair", "rate")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    volume: str
    repair: bool
    rate: int
    def __init__(self, volume: _Optional[str] = ..., repair: bool = ..., rate: _Optional[int] = ...) -> None: ...

class VerifyEvent(_message.Message):
    __slots__ = ("progress", "offsets", "lengths", "repaired", "undecided_bytes")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    UNDECIDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    repaired: bool
    undecided_bytes: int
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., repaired: bool = ..., undecided_bytes: _Optional[int] = ...) -> None: ...

class VolumeList(_message.Message):
    __slots__ = ("volumes",)
    VOLUMES_FIELD_NUMBER: _ClassVar[int]
    volumes: _containers.RepeatedCompositeFieldContainer[Volume]
    def __init__(self, volumes: _Optional[_Iterable[_Union[Volume, _Mapping]]] = ...) -> None: ...

class PrimaryStatus(_message.Message):
    __slots__ = ("info", "volumes", "standby_address", "nbd_address")
    INFO_FIELD_NUMBER: _ClassVar[int]
    VOLUMES_FIELD_NUMBER: _ClassVar[int]
    STANDBY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NBD_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.NodeInfo
    volumes: _containers.RepeatedCompositeFieldContainer[Volume]
    standby_address: str
    nbd_address: str
    def __init__(self, info: _Optional[_Union[_common_pb2.NodeInfo, _Mapping]] = ..., volumes: _Optional[_Iterable[_Union[Volume, _Mapping]]] = ..., standby_address: _Optional[str] = ..., nbd_address: _Optional[str] = ...) -> None: ...
