"""Freezing what uses the volumes, for the moment in which the standby takes a snapshot.

A freeze runs the configured hooks of its volumes, then flushes the volumes on both nodes, so that whatever was written
before it is on the standby when `freeze` returns.

Invariants
- Whatever was frozen is thawed: by `thaw`, when the limit is over, or when this process dies (`freezer.py`).
- `thaw` fails when the freeze had ended before: what was done meanwhile cannot be called quiesced.
- A volume is in one freeze at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import uuid
from collections.abc import Sequence
from typing import Any, Final

from stillpoint.errors import InvalidRequest, NotFound, PeerUnavailable, Refused, StillpointError

from .config import Quiesce, QuiesceHook
from .freezer import thaw
from .pair import PairState
from .volume import Volume

logger = logging.getLogger(__name__)

_FORGET_S: Final = 300.0  # how long one may still ask how a freeze ended
_THAW_TIMEOUT_S: Final = 60.0


class _Freeze:
    """One freeze and its process."""

    def __init__(self, identity: str, volumes: frozenset[str], hooks: Sequence[QuiesceHook]) -> None:
        self.identity = identity
        self.volumes = volumes
        self.hooks = [hook.document() for hook in hooks]
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._began: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    async def begin(self, limit_s: float) -> None:
        """Return when everything is frozen. Raises Refused; what was frozen then is, until `end`."""
        self._task = asyncio.create_task(self._live(limit_s), name=f"freeze {self.identity}")
        answer = await asyncio.shield(self._began)
        if "frozen" not in answer:
            raise Refused(f"freezing failed: {answer.get('error', 'the process that holds the freeze died')}")

    async def _live(self, limit_s: float) -> None:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "primary.freezer",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"limit_s": limit_s, "hooks": self.hooks}).encode() + b"\n")
        self._began.set_result(await _line(process.stdout))
        answer = await _line(process.stdout)
        await process.wait()
        if "thawed" not in answer:
            logger.error("the process that held a freeze died; thawing", extra={"volumes": sorted(self.volumes)})
            loop = asyncio.get_running_loop()
            failures = [await loop.run_in_executor(None, thaw, hook) for hook in reversed(self.hooks)]
            answer = {"thawed": False, "errors": [failure for failure in failures if failure]}
        for failure in answer["errors"]:
            logger.error("thawing failed: %s", failure, extra={"volumes": sorted(self.volumes)})
        self.ended.set_result(answer)

    async def end(self) -> dict[str, Any]:
        """Thaw, and say whether the freeze lasted until now. Raises PeerUnavailable when that takes too long."""
        try:
            async with asyncio.timeout(_THAW_TIMEOUT_S):
                await asyncio.shield(self._began)
                assert self._process is not None and self._process.stdin is not None
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
                return await asyncio.shield(self.ended)
        except TimeoutError:
            raise PeerUnavailable(f"the volumes {', '.join(sorted(self.volumes))} are not thawed yet") from None


class Quiescer:
    """Everything runs on the loop; hooks run in processes of their own."""

    def __init__(self, config: Quiesce) -> None:
        self._config = config
        self._freezes: dict[str, _Freeze] = {}

    async def freeze(self, volumes: Sequence[Volume], *, limit_s: float = 0.0) -> str:
        """The name of the freeze that holds now, for `thaw`. limit_s: 0, or shorter than the configured one.

        Raises InvalidRequest without hooks for a volume, Refused when it cannot be frozen, flushed or is not in sync.
        """
        names = frozenset(volume.record.name for volume in volumes)
        if not names:
            raise InvalidRequest("a freeze needs at least one volume")
        hooks = [self._hook(name) for name in sorted(names)]
        for other in self._freezes.values():
            if names & other.volumes and not other.ended.done():
                raise Refused(f"volume {min(names & other.volumes)!r} is frozen already")
        limit_s = min(limit_s or self._config.limit_s, self._config.limit_s)
        freeze = _Freeze(str(uuid.uuid4()), names, hooks)
        self._freezes[freeze.identity] = freeze
        try:
            async with asyncio.timeout(limit_s):
                await freeze.begin(limit_s)
                await asyncio.gather(*(_bring_over(volume) for volume in volumes))
        except BaseException as error:
            await asyncio.shield(freeze.end())
            self._freezes.pop(freeze.identity, None)
            if isinstance(error, TimeoutError):
                raise Refused(f"volumes {', '.join(sorted(names))}: not frozen and flushed in {limit_s:g} s") from None
            raise
        logger.info("frozen", extra={"volumes": sorted(names), "limit_s": limit_s})
        return freeze.identity

    def _hook(self, volume: str) -> QuiesceHook:
        for hook in self._config.hooks:
            if hook.volume == volume:
                return hook
        raise InvalidRequest(
            f"volume {volume!r} has no freeze hook; add one under quiesce: hooks: in the primary's YAML"
        )

    async def thaw(self, identity: str) -> None:
        """Raises NotFound; Refused when the freeze had ended by itself, or a hook could not thaw."""
        freeze = self._freezes.get(identity)
        if freeze is None:
            raise NotFound(f"there is no freeze {identity!r}")
        answer = await freeze.end()
        asyncio.get_running_loop().call_later(_FORGET_S, self._freezes.pop, identity, None)
        volumes = ", ".join(sorted(freeze.volumes))
        if answer["errors"]:
            raise Refused(f"volumes {volumes}: thawing failed, thaw by hand: {'; '.join(answer['errors'])}")
        if not answer["thawed"]:
            raise Refused(f"volumes {volumes}: the freeze had ended before, at its limit; raise quiesce: limit_s:")
        logger.info("thawed", extra={"volumes": sorted(freeze.volumes)})

    async def stop(self) -> None:
        for freeze in self._freezes.values():
            if not freeze.ended.done():
                with contextlib.suppress(StillpointError):
                    await freeze.end()


async def _bring_over(volume: Volume) -> None:
    """Until the standby has all that was written before, flushed."""
    await volume.export.barrier()
    if volume.pair.sender is not None:
        await volume.pair.sender.room(1)  # the flush of an asynchronous volume does not wait for the standby
    if volume.pair.state is not PairState.IN_SYNC:
        raise Refused(f"volume {volume.record.name!r} is not in sync: the standby lacks some of what was written")


async def _line(output: asyncio.StreamReader) -> dict[str, Any]:
    """The next answer, or nothing when the process is gone."""
    line = await output.readline()
    answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
    return answer
