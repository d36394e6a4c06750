"""The root of standbyctl, and the edge where every error becomes one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import click
import grpc

from .. import __version__
from ..errors import StillpointError
from ..wire.status import from_rpc_error
from .backup import backup
from .bookmark import bookmark
from .command import Group
from .demo import demo
from .failover import promote, rejoin, resolve, switchover
from .local import local
from .mirror import mirror
from .pki import pki
from .snapshot import snapshot
from .status import status
from .store import store
from .volume import volume

PROGRAM = "standbyctl"


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message=f"{PROGRAM} %(version)s")
def cli() -> None:
    """Run a Stillpoint cluster: volumes mirrored to a standby, snapshots of the mirror, backups of the snapshots.

    \b
    Try it on this machine alone:
      standbyctl demo
      standbyctl local up --dir /tmp/sp --volume vol1:256MiB
      export STILLPOINT_CLUSTER=/tmp/sp/cluster.yaml
      standbyctl status
    """


for command in (
    status,
    volume,
    snapshot,
    bookmark,
    store,
    mirror,
    promote,
    switchover,
    rejoin,
    resolve,
    backup,
    pki,
    local,
    demo,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    with _stopping_in_order():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = cli.main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        return _fail(_usage_line(error), 2)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return _leave_closed_pipe()
    except BaseExceptionGroup as group:
        return _fail_group(group)
    except (StillpointError, grpc.RpcError, OSError) as error:
        return _fail(error_line(error), 1)
    return code if isinstance(code, int) else 0


def error_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, grpc.RpcError):
        error = from_rpc_error(error, peer="node")
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _usage_line(error: click.UsageError) -> str:
    command = error.ctx.command_path if error.ctx else PROGRAM
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"


def _fail(line: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)
    return code


def _fail_group(group: BaseExceptionGroup[BaseException]) -> int:
    """Several tasks of a command failed together; the first says why. A bug among them keeps its traceback."""
    expected, bugs = group.split((StillpointError, grpc.RpcError, OSError, KeyboardInterrupt))
    if bugs is not None or expected is None:
        raise group
    first: BaseException = expected
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return _fail("interrupted", 130) if isinstance(first, KeyboardInterrupt) else _fail(error_line(first), 1)


def _leave_closed_pipe() -> int:
    # The reader of our output went away, as `head` does. Point stdout elsewhere, or the flush at exit fails as well.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


@contextlib.contextmanager
def _stopping_in_order() -> Iterator[None]:
    """SIGTERM leaves by way of every `finally`, as Ctrl-C does, so that a demo takes its nodes down."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
