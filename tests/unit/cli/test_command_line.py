"""The command line as such: help, values, and how an error becomes one line."""

from __future__ import annotations

from collections.abc import Iterator

import click
import grpc
import pytest

from stillpoint.cli.command import SnapshotId, VolumeSpec, size, snapshot_identity, volume_spec
from stillpoint.cli.standbyctl import cli, error_line, main
from stillpoint.errors import StillpointError


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands())


def test_the_commands_are_those_that_scripts_rely_on() -> None:
    assert {" ".join(path) for path, command in ALL.items() if not isinstance(command, click.Group)} == {
        *("local up", "local down", "local kill", "local start", "local env", "demo", "status"),
        *("promote", "switchover", "rejoin", "resolve"),
        *("mirror status", "mirror verify", "mirror resume", "mirror resync"),
        *("volume create", "volume list", "volume show", "volume resize", "volume delete", "volume set"),
        *("snapshot create", "snapshot list", "snapshot show", "snapshot delete"),
        *("snapshot protect", "snapshot unprotect", "snapshot rollback", "snapshot export"),
        *("snapshot policy", "bookmark list", "bookmark delete"),
        *("pki init", "pki issue"),
        *("store create", "store list", "store extend", "store delete"),
        *("backup run", "backup list", "backup show", "backup verify", "backup restore", "backup delete"),
        *("backup protect", "backup unprotect", "backup check", "backup prune", "backup gc", "backup export"),
        *("backup extract",),
        *("backup schedule list", "backup schedule run", "backup schedule pause", "backup schedule resume"),
    }


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_help_and_takes_the_shared_options(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--json" in shown and "--cluster" in shown
    if not isinstance(ALL[path], click.Group):
        example = shown.partition("Options:")[0].partition("Example:")[2]
        assert " ".join(path) in example


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_the_line_in_a_list_of_commands_is_not_cut(path: tuple[str, ...]) -> None:
    assert not ALL[path].get_short_help_str(limit=66).endswith("...")


def test_values_are_read() -> None:
    assert size("64KiB") == 65536
    assert snapshot_identity("v@s") == SnapshotId("v", "s")
    assert volume_spec("v:1MiB") == VolumeSpec("v", 1 << 20)


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.0001KiB"])
def test_sizes_that_make_no_sense(text: str) -> None:
    with pytest.raises(click.BadParameter):
        size(text)


@pytest.mark.parametrize("text", ["v", "@s", "v@", "", "@"])
def test_what_names_no_snapshot(text: str) -> None:
    with pytest.raises(click.BadParameter, match="VOLUME@NAME"):
        snapshot_identity(text)


@pytest.mark.parametrize("text", ["v", ":1MiB", "v:", "v:0", "v:many"])
def test_what_describes_no_volume(text: str) -> None:
    with pytest.raises(click.BadParameter):
        volume_spec(text)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StillpointError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_an_error_is_one_line(error: Exception, line: str) -> None:
    assert error_line(error) == line


class Unavailable(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "failed to connect to all addresses;\n ipv4:127.0.0.1:1: Connection refused"


def test_a_status_of_grpc_is_one_line_without_its_innards() -> None:
    assert error_line(Unavailable()) == "the node cannot be reached: connection refused"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "'nonsense'"),
        (["volume", "create"], "'NAME'"),
        (["volume", "create", "v", "--size", "0"], "size of 0"),
        (["volume", "create", "v"], "--device"),
        (["store", "create", "s", "--memory", "1MiB", "--file", "x", "--size", "1MiB"], "either"),
        (["status", "--watch", "--json"], "--watch"),
        (["local", "kill", "nobody", "--dir", "x"], "'primary', 'standby', 'backup'"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert line.startswith("standbyctl: ") and named in line and "--help`" in line
