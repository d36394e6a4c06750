"""What a scrape of the backup node tells of volumes and schedules."""

from __future__ import annotations

from pathlib import Path

from backupnode.metrics import Metrics
from stillpoint.errors import PeerUnavailable
from stillpoint.metrics import PREFIX, Families
from stillpoint.nbd.server import NbdServer
from tests.unit.backupnode.test_schedule import S, ns
from tests.unit.backupnode.test_scheduler import Desk, with_desk


async def scrape(metrics: Metrics) -> dict[str, float]:
    """Samples by name and labels."""
    families = Families()
    await metrics.gather(families)
    found = {}
    for metric in families.all():
        for sample in metric.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix(PREFIX) + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_the_age_of_the_last_success_and_the_state_of_schedules_and_tests_are_told(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        async with desk.running() as scheduler:

            def fresh() -> Metrics:
                return Metrics(desk.bench.repository, desk.bench.puller, NbdServer({}, None), scheduler)  # type: ignore[arg-type]

            labels = '{schedule="vol1",volume="vol1"}'
            before = await scrape(fresh())
            assert before[f"schedule_last_success_timestamp_seconds{labels}"] == 0
            assert before[f"schedule_due_timestamp_seconds{labels}"] == ns("2026-03-28T02:00") / S
            desk.failures = [PeerUnavailable("away")]
            desk.now_ns = ns("2026-03-28T02:00")
            await desk.until(lambda: desk.state.failures == 1)
            assert (await scrape(fresh()))[f"schedule_failures{labels}"] == 1
            desk.now_ns += 300 * S
            await desk.until(lambda: desk.state.success_ns > 0)
            scheduler.pause("vol1", True)
            (record,) = (await desk.bench.repository.list()).backups
            await desk.bench.repository.record_tested(record.id, 5 * S, "no file system")
            await desk.bench.repository.protect(record.id, True)
            after = await scrape(fresh())
        assert after[f"schedule_failures{labels}"] == 0 and after[f"schedule_paused{labels}"] == 1
        assert after[f"schedule_last_success_timestamp_seconds{labels}"] == desk.now_ns / S
        assert after[f"schedule_due_timestamp_seconds{labels}"] == 0
        volume = '{volume="vol1"}'
        assert abs(after[f"backup_last_success_timestamp_seconds{volume}"] - record.finished_ns / S) < 1
        assert after[f"backup_tested_timestamp_seconds{volume}"] == 5
        assert after[f"backup_test_failed{volume}"] == 1 and after[f"backups_protected{volume}"] == 1
        assert after["backup_throttle_bytes"] == 0

    with_desk(tmp_path, body)
