"""An operator's command before or after a backup, with a time limit; what it started is killed at its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Final

from stillpoint.errors import StillpointError

# Of its output, in the message when it fails.
_SAID_BYTES: Final = 500


class HookFailed(StillpointError):
    """A command could not be run, took too long, or ended with an exit code that is not accepted."""


async def run_hook(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    timeout_s: float,
    accepted: Sequence[int] = (0,),
) -> str:
    """Run it without a shell, `environment` added to the node's own. Returns the end of what it said.

    It has a process group of its own, which is killed when it ends, takes too long, or this call is cancelled.
    Raises HookFailed.
    """
    with _output_file() as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(os.environ) | dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            raise HookFailed(f"{command[0]} cannot be run: {error.strerror}") from None
        try:
            async with asyncio.timeout(timeout_s):
                code = await process.wait()
        except TimeoutError:
            raise HookFailed(f"{command[0]} was killed after {timeout_s:g} s{_said(output)}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.returncode is None:
                await process.wait()
        if code not in accepted:
            raise HookFailed(f"{command[0]} ended with exit code {code}{_said(output)}")
        return _tail(output)


@contextlib.contextmanager
def _output_file() -> Iterator[IO[bytes]]:
    """Not a pipe: a command that says more than anybody reads must not wait."""
    with contextlib.ExitStack() as stack:
        try:
            output = stack.enter_context(tempfile.TemporaryFile())
        except OSError as error:
            raise HookFailed(f"no room for what a command says: {error.strerror}") from None
        yield output


def _said(output: IO[bytes]) -> str:
    tail = _tail(output)
    return f", saying: {tail}" if tail else ""


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _SAID_BYTES))
    return " ".join(output.read().decode(errors="replace").split())
