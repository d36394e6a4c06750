"""What a backup can be built on, and what of it must be read again. Decisions, apart from asking the standby."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillpoint.extents import Extent

from .repository import BackupId, BackupRecord, Origin, Partial, Region
from .source import Source


@dataclass(frozen=True, slots=True)
class Start:
    """base: the backup that unchanged bytes come from. resume: an interrupted backup, which may itself have a base."""

    base: BackupId | None
    resume: bool = False

    def __str__(self) -> str:
        return "what an interrupted backup left" if self.resume else f"backup {self.base}"


def starts(origin: Origin, backups: Sequence[BackupRecord], partial: Partial | None) -> list[Start]:
    """The best first; none: everything is to be read."""
    found = []
    base = max(
        (record for record in backups if _fits(record.origin, origin)),
        key=lambda record: record.origin.generation,
        default=None,
    )
    if (
        partial is not None
        and _fits(partial.record.origin, origin)
        and (base is None or partial.record.origin.generation > base.origin.generation)
    ):
        found.append(Start(partial.record.origin.base, resume=True))
    if base is not None:
        found.append(Start(base.id))
    return found


def _fits(then: Origin, now: Origin) -> bool:
    """In the same life of the volume, of the same size, and not after it."""
    return (
        then.incarnation == now.incarnation != ""
        and then.volume_uuid == now.volume_uuid
        and then.size == now.size
        and then.generation <= now.generation
    )


async def changed_in(regions: Sequence[Region], source: Source, *, incarnation: str) -> list[Extent]:
    """What may differ between the source and regions that are as of other instants; all of a region that is unknown."""
    changed: list[Extent] = []
    answers: dict[int, Sequence[Extent] | None] = {}
    begin = 0
    for region in regions:
        here = Extent(begin, region.end - begin)
        begin = region.end
        if region.incarnation != incarnation or not incarnation:
            changed.append(here)
            continue
        if region.generation not in answers:
            answers[region.generation] = await source.changed_since(incarnation, region.generation)
        known = answers[region.generation]
        changed += [here] if known is None else _clipped(known, here)
    return changed


def _clipped(extents: Sequence[Extent], here: Extent) -> list[Extent]:
    clipped = []
    for extent in extents:
        start, end = max(extent.offset, here.offset), min(extent.end, here.end)
        if end > start:
            clipped.append(Extent(start, end - start))
    return clipped
