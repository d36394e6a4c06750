"""Long work on behalf of gRPC calls: reported a few times a second, cancelled with its call, bounded in number."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from stillpoint.errors import PeerUnavailable, Refused

from .progress import Progress, Report

# Between two messages of a stream of progress.
_PROGRESS_INTERVAL_S: Final = 0.2
# Backups being verified, restored or read at once; each may hold 12 MiB.
_READING_MAX: Final = 8

T = TypeVar("T")


class Jobs:
    """`stop` before what the jobs work on is closed."""

    def __init__(self) -> None:
        self._jobs: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._reading_count = 0

    async def stop(self) -> None:
        """Cancel the jobs and wait until each has cleaned up after itself."""
        self._stopping = True
        jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises Refused when the memory set aside for reading is taken."""
        if self._reading_count >= _READING_MAX:
            raise Refused(f"the backup node is reading {_READING_MAX} backups already; wait until one of them is done")
        self._reading_count += 1
        try:
            yield
        finally:
            self._reading_count -= 1

    async def run(
        self, job: Callable[[Report], Coroutine[Any, Any, T]], send: Callable[[Progress], Awaitable[None]]
    ) -> T:
        """Run `job` and send what it last reported, a few times a second and at its end.

        The job is cancelled, and has cleaned up, when this call is cancelled. Raises PeerUnavailable when the node
        stops.
        """
        latest: Progress | None = None

        def report(progress: Progress) -> None:
            nonlocal latest
            latest = progress

        if self._stopping:
            raise PeerUnavailable("the backup node is stopping")
        task = asyncio.create_task(job(report))
        self._jobs.add(task)
        try:
            while True:
                await asyncio.wait([task], timeout=_PROGRESS_INTERVAL_S)
                if latest is not None:
                    progress, latest = latest, None
                    await send(progress)
                if task.done():
                    break
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            self._jobs.discard(task)
        if task.cancelled():
            raise PeerUnavailable("the backup node is stopping")
        return task.result()
