"""Which backups of a volume a policy keeps. Pure: the instants are the backups' own, in UTC, and no clock is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from stillpoint.errors import ConfigError

from .repository import BackupId, BackupRecord


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How many to keep: of the newest, and of the newest of each hour, day, ISO week, month and year that has one.

    All of these 0: everything is kept. minimum: of each volume, no deletion leaves fewer backups than that.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    minimum: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"retention.{field.name} is {getattr(self, field.name)}; it must not be negative")

    @property
    def keeps_everything(self) -> bool:
        return not any(getattr(self, name) for name in _PERIODS)

    def with_minimum(self, minimum: int) -> RetentionPolicy:
        """The same with this minimum, unless its own is larger."""
        return replace(self, minimum=max(self.minimum, minimum))


_PERIODS: dict[str, Callable[[BackupRecord], str]] = {
    "last": lambda record: record.id,
    "hourly": lambda record: _utc(record, "%Y-%m-%d %H"),
    "daily": lambda record: _utc(record, "%Y-%m-%d"),
    "weekly": lambda record: _utc(record, "%G-%V"),
    "monthly": lambda record: _utc(record, "%Y-%m"),
    "yearly": lambda record: _utc(record, "%Y"),
}


def kept(records: Sequence[BackupRecord], policy: RetentionPolicy) -> dict[BackupId, str]:
    """The backups to keep, each with the first reason. `records` are of one volume, in any order.

    Protected ones are kept, and so are the newest and the policy's minimum, whatever else it says. That an incremental
    was made from a backup is no reason to keep it: every backup is complete in itself.
    """
    newest_first = sorted(records, key=lambda record: (record.origin.snapshot_ns, record.id), reverse=True)
    if policy.keeps_everything:
        return {record.id: "no policy" for record in newest_first}
    reasons: dict[BackupId, str] = {}
    for name, period_of in _PERIODS.items():
        seen: set[str] = set()
        for record in newest_first:
            period = period_of(record)
            if period in seen:
                continue
            if len(seen) == getattr(policy, name):
                break
            seen.add(period)
            reasons.setdefault(record.id, name)
    for record in newest_first:
        if record.protected:
            reasons.setdefault(record.id, "protected")
    if newest_first:
        reasons.setdefault(newest_first[0].id, "newest")
    for record in newest_first[: policy.minimum]:
        reasons.setdefault(record.id, "minimum")
    return reasons


def _utc(record: BackupRecord, pattern: str) -> str:
    return time.strftime(pattern, time.gmtime(record.origin.snapshot_ns // 1_000_000_000))
