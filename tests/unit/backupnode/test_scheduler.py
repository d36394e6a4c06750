"""Schedules that really run: against a repository and a standby over gRPC, with real commands, webhooks and mail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from backupnode.hooks import HookFailed, run_hook
from backupnode.notify import MailConfig, Notice, Notifier, NotifyConfig, NotifyOn
from backupnode.progress import Progress, Report
from backupnode.repository import BackupId, BackupRecord
from backupnode.restore_test import RestoreTest, RestoreTestConfig, RestoreTestResult
from backupnode.schedule import ScheduleConfig
from backupnode.scheduler import Scheduler
from stillpoint.errors import ConfigError, NotFound, PeerUnavailable, Refused, StillpointError
from tests.support.backup_node import eventually
from tests.unit.backupnode.test_puller import Bench, with_bench
from tests.unit.backupnode.test_schedule import DAY, HOUR, START, S, ns


@dataclass
class Desk:
    """A scheduler of a bench, with a clock that is set by hand."""

    bench: Bench
    folder: Path
    configs: list[ScheduleConfig]
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    now_ns: int = START
    failures: list[Exception] = field(default_factory=list)  # taken one for each backup
    test_command: tuple[str, ...] = ("/bin/true",)
    scheduler: Scheduler = field(init=False)

    async def back_up(self, volume: str, *, full: bool, report: Report) -> BackupRecord:
        if self.failures:
            raise self.failures.pop(0)
        return await self.bench.puller.run(volume, full=full, report=report)

    async def test(self, backup: BackupId) -> RestoreTestResult:
        record = await self.bench.repository.get(backup)
        with ThreadPoolExecutor(1) as executor:
            test = RestoreTest(self.folder, RestoreTestConfig(self.test_command), executor)
            return await test.run(record, lambda: self.bench.repository.open(backup))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Scheduler]:
        self.scheduler = Scheduler(
            self.configs,
            self.folder / "schedules.json",
            self.back_up,
            self.test,
            self.bench.puller.is_running,
            Notifier(self.notify, pause_s=0.01),
            node="backup",
            clock=lambda: self.now_ns,
            look_s=0.02,
        )
        task = asyncio.create_task(self.scheduler.run())
        try:
            yield self.scheduler
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def ids(self) -> list[str]:
        return [record.id for record in (await self.bench.repository.list()).backups]

    async def until(self, condition: Callable[[], bool]) -> None:
        await eventually(condition)

    @property
    def state(self) -> Any:
        return self.scheduler.status("vol1").state


def with_desk(folder: Path, body: Callable[[Desk], Awaitable[None]], **options: Any) -> None:
    when = options.pop("when", "02:00")
    notify = options.pop("notify", NotifyConfig())

    async def main(bench: Bench) -> None:
        await body(Desk(bench, folder, [ScheduleConfig("vol1", when, **options)], notify))

    with_bench(folder, main)


def ignore(_: Progress) -> None:
    pass


def test_it_backs_up_when_its_time_comes_and_what_was_missed_once(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        async with desk.running():
            await asyncio.sleep(0.1)
            assert await desk.ids() == []
            desk.now_ns = ns("2026-03-28T02:00")
            await desk.until(lambda: desk.state.success_ns > 0)
            assert await desk.ids() == [desk.state.backup]
        desk.now_ns += 30 * DAY + HOUR
        async with desk.running() as scheduler:
            await desk.until(lambda: desk.state.success_ns == desk.now_ns)
            await asyncio.sleep(0.1)
            assert len(await desk.ids()) == 2
            due = scheduler.status("vol1").due
            assert due is not None and due.at_ns == ns("2026-04-28T02:00")

    with_desk(tmp_path, body)


def test_a_failure_is_noted_told_and_tried_again(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        desk.failures = [PeerUnavailable("the standby is away"), RuntimeError("a bug")]
        async with desk.running():
            desk.now_ns = ns("2026-03-28T02:00")
            await desk.until(lambda: desk.state.failures == 1)
            assert desk.state.error == "the standby is away"
            desk.now_ns += 300 * S
            await desk.until(lambda: desk.state.failures == 2)
            assert "internal error (RuntimeError)" in desk.state.error
            desk.now_ns += 600 * S
            await desk.until(lambda: desk.state.success_ns > 0)
            assert desk.state.failures == 0 and desk.state.error == ""
        assert len(await desk.ids()) == 1

    with_desk(tmp_path, body)


def test_a_run_that_a_crash_interrupted_is_tried_again(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        desk.bench.standby.delay_s = 0.1
        async with desk.running():
            desk.now_ns = ns("2026-03-28T02:00")
            await desk.until(lambda: desk.state.running and desk.bench.standby.stream_count > 0)
            document = (tmp_path / "schedules.json").read_bytes()
        # As a kill would have left it.
        (tmp_path / "schedules.json").write_bytes(document)
        desk.bench.standby.delay_s = 0
        async with desk.running():
            assert desk.state.failures == 1 and "in the middle" in desk.state.error
            desk.now_ns += 301 * S
            await desk.until(lambda: desk.state.success_ns > 0)
        assert await desk.ids() == [desk.state.backup]

    with_desk(tmp_path, body)


def test_a_damaged_state_is_put_aside_and_the_schedules_begin_anew(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        for damaged in ('{"version": 1, "sched', '{"version": 9}', '{"version": 1, "schedules": {"vol1": {"x": 1}}}'):
            (tmp_path / "schedules.json").write_text(damaged)
            async with desk.running():
                assert desk.state.handled_ns == START and not desk.state.failures
            assert (tmp_path / "schedules.json.damaged").read_text() == damaged

    with_desk(tmp_path, body)


def test_a_pause_outlives_a_restart(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        async with desk.running() as scheduler:
            assert scheduler.pause("vol1", True).due is None
            with pytest.raises(NotFound, match="no schedule vol9"):
                scheduler.pause("vol9", True)
        desk.now_ns += 10 * DAY
        async with desk.running() as scheduler:
            await asyncio.sleep(0.1)
            assert desk.state.paused and await desk.ids() == []
            # Out of turn it may run nevertheless.
            await scheduler.run_now("vol1", ignore)
            due = scheduler.pause("vol1", False).due
            assert due is not None and due.at_ns == ns("2026-04-07T02:00")

    with_desk(tmp_path, body)


def test_a_schedule_waits_for_a_backup_that_somebody_else_began(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        desk.bench.standby.delay_s = 0.05
        async with desk.running() as scheduler:
            by_hand = asyncio.create_task(desk.bench.puller.run("vol1", report=ignore))
            await asyncio.sleep(0.05)
            with pytest.raises(Refused, match="a backup of volume vol1 is running"):
                await scheduler.run_now("vol1", ignore)
            desk.now_ns = ns("2026-03-28T02:00")
            await by_hand
            desk.bench.standby.delay_s = 0.2
            await desk.until(lambda: desk.state.running)
            with pytest.raises(Refused, match="schedule vol1 is running"):
                await scheduler.run_now("vol1", ignore)
            desk.bench.standby.delay_s = 0
            await desk.until(lambda: desk.state.success_ns > 0)
        assert len(await desk.ids()) == 2 and desk.state.failures == 0

    with_desk(tmp_path, body)


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


def test_hooks_run_before_and_after_and_are_told_what_became_of_it(tmp_path: Path) -> None:
    said = tmp_path / "said"
    note = f"echo $STILLPOINT_SCHEDULE $STILLPOINT_VOLUME $STILLPOINT_RESULT $STILLPOINT_BACKUP >> {said}"

    async def body(desk: Desk) -> None:
        async with desk.running() as scheduler:
            record = await scheduler.run_now("vol1", ignore)
            assert said.read_text() == f"vol1 vol1\nvol1 vol1 success {record.id}\n"
            desk.failures = [PeerUnavailable("away")]
            with pytest.raises(PeerUnavailable):
                await scheduler.run_now("vol1", ignore)
            assert said.read_text().endswith("vol1 vol1\nvol1 vol1 failure\n")

    with_desk(tmp_path, body, before=shell(note), after=shell(note))


def test_without_its_hook_before_there_is_no_backup_and_the_one_after_runs(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        async with desk.running() as scheduler:
            with pytest.raises(HookFailed, match="exit code 3, saying: the database is busy"):
                await scheduler.run_now("vol1", ignore)
        assert (tmp_path / "thawed").exists()
        await desk.bench.assert_nothing_is_left()
        assert desk.state.failures == 1

    before = shell("echo the database is busy; exit 3")
    with_desk(tmp_path, body, before=before, after=("/usr/bin/touch", str(tmp_path / "thawed")))


def test_a_hook_after_that_fails_is_a_warning_that_is_told(tmp_path: Path) -> None:
    with webhook() as (url, posted):

        async def body(desk: Desk) -> None:
            async with desk.running() as scheduler:
                record = await scheduler.run_now("vol1", ignore)
            assert await desk.ids() == [record.id] and desk.state.failures == 0
            assert posted[-1]["succeeded"] is True and "exit code 1" in posted[-1]["warnings"][0]

        with_desk(tmp_path, body, after=("/bin/false",), notify=NotifyConfig(webhook=url))


def test_each_backup_is_put_to_the_test_if_asked_and_a_failed_one_is_told(tmp_path: Path) -> None:
    with webhook() as (url, posted):

        async def body(desk: Desk) -> None:
            async with desk.running() as scheduler:
                await scheduler.run_now("vol1", ignore)
                assert posted == []
                desk.test_command = ("/bin/sh", "-c", "echo no file system; exit 4")
                record = await scheduler.run_now("vol1", ignore)
            assert posted[-1]["backup"] == record.id and desk.state.failures == 0
            assert "the restore test failed" in posted[-1]["warnings"][0]
            assert "no file system" in posted[-1]["warnings"][0]

        with_desk(tmp_path, body, restore_test=True, notify=NotifyConfig(webhook=url))


def test_a_stop_during_the_restore_test_leaves_a_backup_that_succeeded(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        desk.test_command = ("/bin/sleep", "60")
        async with desk.running():
            desk.now_ns = ns("2026-03-28T02:00")
            await desk.until(lambda: desk.state.success_ns > 0)
        async with desk.running():
            assert not desk.state.failures and not desk.state.running
            assert await desk.ids() == [desk.state.backup]

    with_desk(tmp_path, body, restore_test=True)


def test_an_unexpected_error_silences_no_schedule(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        busy = desk.bench.puller.is_running
        faults = [TypeError("a bug")]

        def faulty(volume: str) -> bool:
            if faults:
                raise faults.pop()
            return busy(volume)

        desk.bench.puller.is_running = faulty  # type: ignore[method-assign]
        async with desk.running():
            desk.now_ns = ns("2026-03-28T02:00")
            await desk.until(lambda: desk.state.success_ns > 0)
        assert not faults

    with_desk(tmp_path, body)


def test_a_stop_of_the_node_still_thaws(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        desk.bench.standby.delay_s = 0.1
        async with desk.running():
            desk.now_ns = ns("2026-03-28T02:00")
            await desk.until(lambda: desk.bench.standby.stream_count > 0)
        await desk.until((tmp_path / "thawed").exists)
        await desk.bench.assert_nothing_is_left()
        assert not desk.state.running and desk.state.failures == 1

    with_desk(tmp_path, body, after=("/usr/bin/touch", str(tmp_path / "thawed")))


def test_a_hook_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    script = f"(sleep 60; touch {tmp_path}/late) & echo $! > {tmp_path}/child; sleep 60"

    async def main() -> None:
        with pytest.raises(HookFailed, match=r"/bin/sh was killed after 1\.5 s"):
            await run_hook(shell(script), environment={}, timeout_s=1.5)
        child = int((tmp_path / "child").read_text())
        await eventually(lambda: _is_dead(child))
        with pytest.raises(HookFailed, match="cannot be run: No such file"):
            await run_hook(["/no/such/program"], environment={}, timeout_s=1)

    asyncio.run(main())


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_hook_that_says_much_costs_little(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(HookFailed) as raised:
            await run_hook(shell("yes | head -c 30000000; exit 1"), environment={}, timeout_s=30)
        assert len(str(raised.value)) < 700

    asyncio.run(main())


@contextmanager
def webhook(refusals: int = 0) -> Iterator[tuple[str, list[Any]]]:
    """Its URL, and what was posted to it. Answers 503 so many times first."""
    posted: list[Any] = []
    left = refusals

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal left
            body = self.rfile.read(int(self.headers["Content-Length"]))
            left -= 1
            if left >= 0:
                self.send_error(503)
                return
            posted.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", posted
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FAILED = Notice("backup", "nightly", "vol1", False, START, START + 5 * S, error="away\nfor good", failures=2)
DONE = Notice("backup", "nightly", "vol1", True, START, START + 5 * S, backup="b1")


def test_a_failure_is_posted_and_a_success_only_if_asked(tmp_path: Path) -> None:
    async def main() -> None:
        with webhook(refusals=1) as (url, posted):
            await Notifier(NotifyConfig(webhook=url), pause_s=0.01).tell(DONE)
            assert posted == []
            await Notifier(NotifyConfig(webhook=url), pause_s=0.01).tell(FAILED)
            assert posted[0]["volume"] == "vol1" and posted[0]["error"] == "away\nfor good"
            assert posted[0]["succeeded"] is False and posted[0]["failures"] == 2
            await Notifier(NotifyConfig(when=NotifyOn.ALWAYS, webhook=url)).tell(DONE)
            assert posted[1]["backup"] == "b1"

    asyncio.run(main())


def test_nobody_listening_is_logged_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    config = NotifyConfig(webhook="http://127.0.0.1:1/x", mail=MailConfig(("a@b",), host="127.0.0.1", port=1))
    asyncio.run(Notifier(config, pause_s=0.01).tell(FAILED))
    assert "nobody was told by webhook" in caplog.text and "nobody was told by mail" in caplog.text


def test_a_webhook_that_speaks_nonsense_is_logged_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"this is no HTTP at all\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(babble, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await Notifier(NotifyConfig(webhook=f"http://127.0.0.1:{port}/"), pause_s=0.01).tell(FAILED)
        server.close()
        await server.wait_closed()

    asyncio.run(main())
    assert "nobody was told by webhook" in caplog.text


def test_a_failure_is_mailed() -> None:
    async def main() -> None:
        mails: list[str] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """As much of SMTP as a client needs."""
            writer.write(b"220 here\r\n")
            while line := await reader.readline():
                if line.lower() == b"data\r\n":
                    writer.write(b"354 go on\r\n")
                    mails.append((await reader.readuntil(b"\r\n.\r\n")).decode())
                writer.write(b"221 bye\r\n" if line.lower() == b"quit\r\n" else b"250 ok\r\n")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        mail = MailConfig(("admin@example.org", "other@example.org"), host="127.0.0.1", port=port)
        await Notifier(NotifyConfig(mail=mail)).tell(FAILED)
        server.close()
        await server.wait_closed()
        (text,) = mails
        assert "Subject: backup of vol1 FAILED on backup" in text
        assert "To: admin@example.org, other@example.org" in text and "failures in a row: 2" in text

    asyncio.run(main())


@pytest.mark.parametrize(
    "make",
    [
        lambda: NotifyConfig(webhook="ftp://x"),
        lambda: NotifyConfig(webhook="file:///etc/passwd"),
        lambda: NotifyConfig(mail=MailConfig(("nobody",))),
        lambda: NotifyConfig(mail=MailConfig(("a@b\nBcc: c@d",))),
    ],
)
def test_addresses_that_make_no_sense_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_an_error_of_a_run_out_of_turn_reaches_the_caller(tmp_path: Path) -> None:
    async def body(desk: Desk) -> None:
        desk.failures = [ValueError("a bug")]
        async with desk.running() as scheduler:
            with pytest.raises(StillpointError, match=r"internal error \(ValueError\)"):
                await scheduler.run_now("vol1", ignore)
            with pytest.raises(NotFound):
                await scheduler.run_now("vol9", ignore)

    with_desk(tmp_path, body)
