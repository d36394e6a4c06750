"""What every command of standbyctl has in common: --json and --cluster anywhere on the line, and its value types."""

from __future__ import annotations

import asyncio
import functools
import re
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from ..config import parse_size
from ..errors import InvalidRequest
from .cluster import load_cluster
from .nodes import Nodes
from .output import Output

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class Invocation:
    """One run of standbyctl: what the options that all commands share have said."""

    output: Output = field(default_factory=Output)
    cluster_file: Path | None = None

    def nodes(self) -> Nodes:
        """The nodes of the cluster. Raises ConfigError when there is no usable cluster file."""
        return Nodes(load_cluster(self.cluster_file))


pass_invocation = click.make_pass_decorator(Invocation)


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    # Only ever switched on: the option may stand before the subcommand, after it, or at both places.
    context.find_root().ensure_object(Invocation).output.as_json |= value


def _set_cluster(context: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.find_root().ensure_object(Invocation).cluster_file = value


def _shared_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--cluster"],
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            expose_value=False,
            callback=_set_cluster,
            help="The cluster file; else $STILLPOINT_CLUSTER, else ./cluster.yaml.",
        ),
        click.Option(
            ["--json"], is_flag=True, expose_value=False, callback=_set_json, help="One JSON document on stdout."
        ),
    ]


class Command(click.Command):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.extend(_shared_options())


class Group(click.Group):
    command_class = Command
    group_class = type

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.extend(_shared_options())


def asynchronous(body: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    """A command whose body is a coroutine. SIGTERM cancels it, as Ctrl-C does: it leaves by way of every `finally`."""

    @functools.wraps(body)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        terminated = False

        async def until_terminated() -> R:
            task = asyncio.current_task()
            assert task is not None

            def terminate() -> None:
                nonlocal terminated
                terminated = True
                task.cancel()

            # An exception raised by a handler of the interpreter would end whatever task is running just then.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
            return await body(*arguments, **options)

        try:
            return asyncio.run(until_terminated())
        except asyncio.CancelledError:
            if terminated:
                raise SystemExit(128 + signal.SIGTERM) from None
            raise

    return run


def size(text: str | int) -> int:
    """A value type of options: bytes, written "64MiB" or "65536"; never 0."""
    try:
        parsed = parse_size(text)
    except InvalidRequest as error:
        raise click.BadParameter(str(error)) from None
    if parsed == 0:
        raise click.BadParameter("a size of 0 makes no sense")
    return parsed


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration_s(text: str | float) -> float:
    """A value type of options: seconds, written "90s", "10m", "2h" or "1d"; never 0."""
    if isinstance(text, float):
        return text
    parsed = _DURATION.fullmatch(text.strip())
    seconds = float(parsed[1]) * _SECONDS[parsed[2]] if parsed else 0.0
    if not seconds:
        raise click.BadParameter(f"{text!r} is not a time; write it as 90s, 10m, 2h or 1d")
    return seconds


@dataclass(frozen=True, slots=True)
class SnapshotId:
    volume: str
    name: str

    def __str__(self) -> str:
        return f"{self.volume}@{self.name}"


def snapshot_identity(text: str) -> SnapshotId:
    """A value type of arguments: VOLUME@NAME."""
    return SnapshotId(*_member(text, "snapshot"))


@dataclass(frozen=True, slots=True)
class BookmarkId:
    volume: str
    name: str

    def __str__(self) -> str:
        return f"{self.volume}@{self.name}"


def bookmark_identity(text: str) -> BookmarkId:
    """A value type of arguments: VOLUME@NAME."""
    return BookmarkId(*_member(text, "bookmark"))


def _member(text: str, what: str) -> tuple[str, str]:
    volume, at, name = text.partition("@")
    if not (volume and at and name):
        raise click.BadParameter(f"{text!r} does not name a {what}; write VOLUME@NAME")
    return volume, name


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    name: str
    size: int


def volume_spec(text: str) -> VolumeSpec:
    """A value type of options: NAME:SIZE."""
    name, colon, size_text = text.partition(":")
    if not (name and colon and size_text):
        raise click.BadParameter(f"{text!r} does not describe a volume; write NAME:SIZE, such as vol1:256MiB")
    return VolumeSpec(name, size(size_text))


yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is destroyed, when there is somebody to ask. Raises click.Abort on no."""
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)
