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
    __slots__ = ("id", "volume", "volume_uuid", "snapshot", "size", "snapshot_ns", "finished_ns", "data_bytes", "stored_bytes", "received_bytes", "duration_ns", "base", "verified_ns", "protected", "alarm", "tested_ns", "test_error")
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
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    ALARM_FIELD_NUMBER: _ClassVar[int]
    TESTED_NS_FIELD_NUMBER: _ClassVar[int]
    TEST_ERROR_FIELD_NUMBER: _ClassVar[int]
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
    protected: bool
    alarm: str
    tested_ns: int
    test_error: str
    def __init__(self, id: _Optional[str] = ..., volume: _Optional[str] = ..., volume_uuid: _Optional[str] = ..., snapshot: _Optional[str] = ..., size: _Optional[int] = ..., snapshot_ns: _Optional[int] = ..., finished_ns: _Optional[int] = ..., data_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., duration_ns: _Optional[int] = ..., base: _Optional[str] = ..., verified_ns: _Optional[int] = ..., protected: bool = ..., alarm: _Optional[str] = ..., tested_ns: _Optional[int] = ..., test_error: _Optional[str] = ...) -> None: ...

class BackupUsage(_message.Message):
    __slots__ = ("referenced_bytes", "unique_bytes")
    REFERENCED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    referenced_bytes: int
    unique_bytes: int
    def __init__(self, referenced_bytes: _Optional[int] = ..., unique_bytes: _Optional[int] = ...) -> None: ...

class ProtectBackupRequest(_message.Message):
    __slots__ = ("id", "protected")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    id: str
    protected: bool
    def __init__(self, id: _Optional[str] = ..., protected: bool = ...) -> None: ...

class BackupList(_message.Message):
    __slots__ = ("backups", "damaged", "repository_bytes")
    BACKUPS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    backups: _containers.RepeatedCompositeFieldContainer[Backup]
    damaged: _containers.RepeatedScalarFieldContainer[str]
    repository_bytes: int
    def __init__(self, backups: _Optional[_Iterable[_Union[Backup, _Mapping]]] = ..., damaged: _Optional[_Iterable[str]] = ..., repository_bytes: _Optional[int] = ...) -> None: ...

class RetentionPolicy(_message.Message):
    __slots__ = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    LAST_FIELD_NUMBER: _ClassVar[int]
    HOURLY_FIELD_NUMBER: _ClassVar[int]
    DAILY_FIELD_NUMBER: _ClassVar[int]
    WEEKLY_FIELD_NUMBER: _ClassVar[int]
    MONTHLY_FIELD_NUMBER: _ClassVar[int]
    YEARLY_FIELD_NUMBER: _ClassVar[int]
    last: int
    hourly: int
    daily: int
    weekly: int
    monthly: int
    yearly: int
    def __init__(self, last: _Optional[int] = ..., hourly: _Optional[int] = ..., daily: _Optional[int] = ..., weekly: _Optional[int] = ..., monthly: _Optional[int] = ..., yearly: _Optional[int] = ...) -> None: ...

class PruneRequest(_message.Message):
    __slots__ = ("volume", "policy", "dry_run")
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    volume: str
    policy: RetentionPolicy
    dry_run: bool
    def __init__(self, volume: _Optional[str] = ..., policy: _Optional[_Union[RetentionPolicy, _Mapping]] = ..., dry_run: bool = ...) -> None: ...

class PruneVerdict(_message.Message):
    __slots__ = ("backup", "kept_by")
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    KEPT_BY_FIELD_NUMBER: _ClassVar[int]
    backup: Backup
    kept_by: str
    def __init__(self, backup: _Optional[_Union[Backup, _Mapping]] = ..., kept_by: _Optional[str] = ...) -> None: ...

class PruneReport(_message.Message):
    __slots__ = ("verdicts",)
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[PruneVerdict]
    def __init__(self, verdicts: _Optional[_Iterable[_Union[PruneVerdict, _Mapping]]] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("dry_run", "fence")
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    fence: bool
    def __init__(self, dry_run: bool = ..., fence: bool = ...) -> None: ...

class CollectReport(_message.Message):
    __slots__ = ("deleted_packs", "deleted_bytes", "repacked_bytes", "pending_packs", "pending_bytes", "unreferenced_bytes")
    DELETED_PACKS_FIELD_NUMBER: _ClassVar[int]
    DELETED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPACKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PENDING_PACKS_FIELD_NUMBER: _ClassVar[int]
    PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNREFERENCED_BYTES_FIELD_NUMBER: _ClassVar[int]
    deleted_packs: int
    deleted_bytes: int
    repacked_bytes: int
    pending_packs: int
    pending_bytes: int
    unreferenced_bytes: int
    def __init__(self, deleted_packs: _Optional[int] = ..., deleted_bytes: _Optional[int] = ..., repacked_bytes: _Optional[int] = ..., pending_packs: _Optional[int] = ..., pending_bytes: _Optional[int] = ..., unreferenced_bytes: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("deep", "budget_s")
    DEEP_FIELD_NUMBER: _ClassVar[int]
    BUDGET_S_FIELD_NUMBER: _ClassVar[int]
    deep: bool
    budget_s: float
    def __init__(self, deep: bool = ..., budget_s: _Optional[float] = ...) -> None: ...

class AffectedBackup(_message.Message):
    __slots__ = ("id", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    reason: str
    def __init__(self, id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class CheckReport(_message.Message):
    __slots__ = ("checked_bytes", "checked_packs", "damaged_packs", "lost_blobs", "affected", "whole", "damaged_notes", "complete", "pass_started_ns")
    CHECKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKED_PACKS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_PACKS_FIELD_NUMBER: _ClassVar[int]
    LOST_BLOBS_FIELD_NUMBER: _ClassVar[int]
    AFFECTED_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_NOTES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    PASS_STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    checked_bytes: int
    checked_packs: int
    damaged_packs: _containers.RepeatedScalarFieldContainer[str]
    lost_blobs: int
    affected: _containers.RepeatedCompositeFieldContainer[AffectedBackup]
    whole: _containers.RepeatedScalarFieldContainer[str]
    damaged_notes: _containers.RepeatedScalarFieldContainer[str]
    complete: bool
    pass_started_ns: int
    def __init__(self, checked_bytes: _Optional[int] = ..., checked_packs: _Optional[int] = ..., damaged_packs: _Optional[_Iterable[str]] = ..., lost_blobs: _Optional[int] = ..., affected: _Optional[_Iterable[_Union[AffectedBackup, _Mapping]]] = ..., whole: _Optional[_Iterable[str]] = ..., damaged_notes: _Optional[_Iterable[str]] = ..., complete: bool = ..., pass_started_ns: _Optional[int] = ...) -> None: ...

class CheckEvent(_message.Message):
    __slots__ = ("progress", "report")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    report: CheckReport
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., report: _Optional[_Union[CheckReport, _Mapping]] = ...) -> None: ...

class RestoreTest(_message.Message):
    __slots__ = ("passed", "detail", "finished_ns", "duration_ns")
    PASSED_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FINISHED_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    passed: bool
    detail: str
    finished_ns: int
    duration_ns: int
    def __init__(self, passed: bool = ..., detail: _Optional[str] = ..., finished_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ...) -> None: ...

class RestoreBackupRequest(_message.Message):
    __slots__ = ("id", "target", "force", "differences", "verify")
    ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    id: str
    target: str
    force: bool
    differences: bool
    verify: bool
    def __init__(self, id: _Optional[str] = ..., target: _Optional[str] = ..., force: bool = ..., differences: bool = ..., verify: bool = ...) -> None: ...

class ReadBackupRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ExportBackupRequest(_message.Message):
    __slots__ = ("id", "writable", "discard")
    ID_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    DISCARD_FIELD_NUMBER: _ClassVar[int]
    id: str
    writable: bool
    discard: bool
    def __init__(self, id: _Optional[str] = ..., writable: bool = ..., discard: bool = ...) -> None: ...

class BackupExport(_message.Message):
    __slots__ = ("name", "address", "writable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    writable: bool
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., writable: bool = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("name", "volume", "when", "full", "paused", "running", "due_ns", "due_is_retry", "failures", "started_ns", "finished_ns", "success_ns", "backup", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    WHEN_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    DUE_NS_FIELD_NUMBER: _ClassVar[int]
    DUE_IS_RETRY_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_NS_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_NS_FIELD_NUMBER: _ClassVar[int]
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    volume: str
    when: str
    full: bool
    paused: bool
    running: bool
    due_ns: int
    due_is_retry: bool
    failures: int
    started_ns: int
    finished_ns: int
    success_ns: int
    backup: str
    error: str
    def __init__(self, name: _Optional[str] = ..., volume: _Optional[str] = ..., when: _Optional[str] = ..., full: bool = ..., paused: bool = ..., running: bool = ..., due_ns: _Optional[int] = ..., due_is_retry: bool = ..., failures: _Optional[int] = ..., started_ns: _Optional[int] = ..., finished_ns: _Optional[int] = ..., success_ns: _Optional[int] = ..., backup: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class ScheduleList(_message.Message):
    __slots__ = ("schedules",)
    SCHEDULES_FIELD_NUMBER: _ClassVar[int]
    schedules: _containers.RepeatedCompositeFieldContainer[Schedule]
    def __init__(self, schedules: _Optional[_Iterable[_Union[Schedule, _Mapping]]] = ...) -> None: ...

class ScheduleName(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PauseScheduleRequest(_message.Message):
    __slots__ = ("name", "paused")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    paused: bool
    def __init__(self, name: _Optional[str] = ..., paused: bool = ...) -> None: ...

class BackupStatus(_message.Message):
    __slots__ = ("info", "repository", "repository_bytes", "backup_count", "standby_address", "nbd_address", "running", "problems")
    INFO_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BACKUP_COUNT_FIELD_NUMBER: _ClassVar[int]
    STANDBY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NBD_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.NodeInfo
    repository: str
    repository_bytes: int
    backup_count: int
    standby_address: str
    nbd_address: str
    running: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, info: _Optional[_Union[_common_pb2.NodeInfo, _Mapping]] = ..., repository: _Optional[str] = ..., repository_bytes: _Optional[int] = ..., backup_count: _Optional[int] = ..., standby_address: _Optional[str] = ..., nbd_address: _Optional[str] = ..., running: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...
