"""The main process's side of the export process: starts it, tells it what there is to export, starts it again.

The export process may die, hang or fall behind without any effect on mirrored writes; a snapshot is durable whether or
not it is exported.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from stillpoint.config import Address
from stillpoint.errors import InUse, PeerUnavailable

from .config import StandbyConfig
from .export_control import ControlSocket

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 20.0
_ANSWER_TIMEOUT_S = 10.0
# A scraper does not wait longer than this, and a process that takes this long deserves to be seen as down.
_STATISTICS_TIMEOUT_S = 3.0
_RESTART_FIRST_S = 0.1
_RESTART_MAX_S = 5.0


class ExportSupervisor:
    def __init__(self, config: StandbyConfig, describe: Callable[[], dict[str, dict[str, Any]]]) -> None:
        """describe: every volume's description, by name, as it is now."""
        self._config = config
        self._describe = describe
        self._process: subprocess.Popen[bytes] | None = None
        self._control: ControlSocket | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._task: asyncio.Task[None] | None = None
        self.grpc_address = config.listen.export_grpc
        self.nbd_address = config.listen.nbd

    @property
    def pid(self) -> int:
        """0 while it is down."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    @property
    def is_started(self) -> bool:
        return self._task is not None

    async def start(self) -> None:
        """Raises InUse when its ports are taken."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(started), name="export process")
        await started

    async def _run(self, started: asyncio.Future[None]) -> None:
        pause_s = _RESTART_FIRST_S
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._one_life(started)
            except (InUse, PeerUnavailable) as error:
                if not started.done():
                    started.set_exception(error)
                    return
                logger.error("export process: %s", error)
            lived_s = asyncio.get_running_loop().time() - began
            pause_s = _RESTART_FIRST_S if lived_s > _RESTART_MAX_S else min(pause_s * 2, _RESTART_MAX_S)
            logger.warning("the export process ended; starting it again", extra={"in_s": pause_s})
            await asyncio.sleep(pause_s)

    async def _one_life(self, started: asyncio.Future[None]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = process = _spawn(theirs.fileno())
        control = await ControlSocket.over(ours)
        try:
            self._control = control
            reading = asyncio.create_task(self._read(control))
            try:
                await self._greet()
                if not started.done():
                    started.set_result(None)
                for name, description in self._describe().items():
                    self._post({"volume": name, "description": description})
                await reading
            finally:
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
        finally:
            self._control = None
            control.close()
            await asyncio.get_running_loop().run_in_executor(None, _reap, process)

    async def _greet(self) -> None:
        listen = self._config.listen
        answer = await self._ask(
            {
                "listen": {
                    "grpc": str(self.grpc_address),
                    "nbd": str(self.nbd_address),
                    "nbd_connections": self._config.limits.nbd_connections,
                    "tls": self._tls(),
                }
            },
            timeout_s=_START_TIMEOUT_S,
        )
        if "error" in answer:
            raise InUse(str(answer["error"]))
        # Port 0 was any free one the first time; it has to stay the same when the process starts again.
        self.grpc_address = Address(listen.export_grpc.host, answer["grpc_port"])
        self.nbd_address = Address(listen.nbd.host, answer["nbd_port"])
        logger.info("export process serving", extra={"grpc": self.grpc_address, "nbd": self.nbd_address})

    def _tls(self) -> dict[str, str] | None:
        tls = self._config.tls
        return {"directory": str(tls.directory), "nbd": tls.nbd.value} if tls is not None else None

    async def _read(self, control: ControlSocket) -> None:
        async for message in control.messages():
            waiting = self._answers.pop(message.get("done", 0), None)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(PeerUnavailable("the export process ended"))
        self._answers.clear()

    def _post(self, message: dict[str, Any]) -> asyncio.Future[dict[str, Any]]:
        assert self._control is not None
        self._number += 1
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # not every answer is awaited
        self._answers[self._number] = answer
        self._control.send({"number": self._number, **message})
        return answer

    async def _ask(self, message: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._post(message)
        except TimeoutError:
            raise PeerUnavailable("the export process does not answer") from None

    async def publish(self, volume: str, description: dict[str, Any] | None) -> None:
        """Tell the export process what a volume's snapshots are; None: the volume is gone.

        On return it serves them and has closed what is no longer there. If it is down or slow, that happens when it is
        back; the log says so.
        """
        if self._control is None:
            return
        try:
            answer = await self._ask({"volume": volume, "description": description}, timeout_s=_ANSWER_TIMEOUT_S)
        except PeerUnavailable as error:
            logger.warning("snapshots not published yet: %s", error, extra={"volume": volume})
            return
        if "error" in answer:
            logger.error("the export process refused: %s", answer["error"], extra={"volume": volume})

    async def withdraw(self, snapshot: str) -> list[str]:
        """Stop serving the snapshot, unless somebody reads it: who does. Nobody reads while the process is down."""
        return list((await self._ask_if_up({"withdraw": snapshot})).get("readers", ()))

    async def readers(self, snapshots: Sequence[str]) -> dict[str, list[str]]:
        """By snapshot, those that are being read: one entry for each NBD connection and each gRPC stream."""
        return dict((await self._ask_if_up({"readers": list(snapshots)})).get("readers", {})) if snapshots else {}

    async def statistics(self) -> dict[str, Any] | None:
        """What the process has served since it started; None while it is down or does not answer."""
        return (await self._ask_if_up({"statistics": True}, timeout_s=_STATISTICS_TIMEOUT_S)).get("statistics")

    async def _ask_if_up(self, message: dict[str, Any], *, timeout_s: float = _ANSWER_TIMEOUT_S) -> dict[str, Any]:
        if self._control is None:
            return {}
        try:
            return await self._ask(message, timeout_s=timeout_s)
        except PeerUnavailable as error:
            logger.warning("%s", error)
            return {}

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, InUse, PeerUnavailable):
                await self._task


def _spawn(control_fd: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "standby.export", "--control", str(control_fd)],
        pass_fds=(control_fd,),
        stdin=subprocess.DEVNULL,
    )


def _reap(process: subprocess.Popen[bytes]) -> None:
    """It ends by itself when its control socket closes; if not, it is made to."""
    for end in (None, process.terminate, process.kill):
        if end is not None:
            end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2.0)
            return
