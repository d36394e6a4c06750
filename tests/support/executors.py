"""Worker threads that hold a step back until the test lets it go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class HeldExecutor(ThreadPoolExecutor):
    """While `may_go` is not set, functions whose qualified name begins with `held` wait for it."""

    def __init__(self, held: str) -> None:
        super().__init__(4)
        self._held = held
        self.may_go = threading.Event()
        self.may_go.set()
        self.reached = threading.Event()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        name = getattr(getattr(function, "func", function), "__qualname__", "")  # of what a partial calls

        def when_allowed() -> Any:
            if name.startswith(self._held):
                self.reached.set()
                assert self.may_go.wait(20)
            return function(*arguments, **named)

        return super().submit(when_allowed)

    async def hold(self, task: asyncio.Task[Any] | None = None) -> None:
        """Until a step is held; `task` must not end before."""
        while not self.reached.is_set():
            assert task is None or not task.done()
            await asyncio.sleep(0.001)
