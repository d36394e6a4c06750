"""standbyctl local: a three-node cluster on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .command import Group, Invocation, VolumeSpec, asynchronous, pass_invocation, volume_spec
from .local_cluster import NODES, LocalCluster
from .local_configuration import CARRIERS, Security
from .output import Output


def dir_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--dir",
        "directory",
        required=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Holds the cluster: configuration, state, logs.",
    )(function)


@click.group(cls=Group)
def local() -> None:
    """A cluster of three nodes on this machine.

    They are reachable on loopback only, and everything they write is in one directory.
    """


@local.command()
@dir_option
@click.option(
    "--volume", "volumes", type=volume_spec, multiple=True, metavar="NAME:SIZE", help="Make this volume; repeatable."
)
@click.option("--carrier", type=click.Choice(CARRIERS), help="How mirrored writes travel. [default: tcp]")
@click.option(
    "--nbd-tls", "security", flag_value=Security.NBD_TLS.name, help="Refuse NBD clients in plaintext, as off loopback."
)
@click.option(
    "--insecure",
    "security",
    flag_value=Security.INSECURE.name,
    help="No TLS and no certificates at all: on loopback only.",
)
@pass_invocation
@asynchronous
async def up(
    invocation: Invocation,
    directory: Path,
    volumes: tuple[VolumeSpec, ...],
    carrier: str | None,
    security: str | None,
) -> None:
    """Start the nodes and make volumes.

    What runs already is left alone, and so are volumes that are there. Ends when all of them are in sync.

    Certificates are made in DIR/pki, and what travels between the nodes and standbyctl is secured by them. NBD clients
    may come in plaintext or by TLS with DIR/pki/client, unless --nbd-tls is given.

    \b
    Example: standbyctl local up --dir /tmp/sp --volume vol1:256MiB
             export STILLPOINT_CLUSTER=/tmp/sp/cluster.yaml
    """
    cluster = LocalCluster(directory)
    invocation.output.remark("starting a primary, a standby and a backup node …")
    chosen = Security[security] if security else None
    if chosen is Security.INSECURE:
        invocation.output.remark("INSECURE: no TLS; whoever is on this machine can read and change everything")
    await cluster.up(volumes, carrier=carrier, security=chosen)
    environment = await cluster.environment()
    if invocation.output.as_json:
        invocation.output.document(environment)
    else:
        _show(invocation.output, environment)


@local.command()
@dir_option
@pass_invocation
def down(invocation: Invocation, directory: Path) -> None:
    """Stop the nodes in order. Their state stays; `up` starts them again.

    \b
    Example: standbyctl local down --dir /tmp/sp
    """
    stopped = LocalCluster(directory).down()
    if invocation.output.as_json:
        invocation.output.document({"stopped": stopped})
    else:
        invocation.output.line(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


@local.command()
@click.argument("node", type=click.Choice(NODES))
@dir_option
@pass_invocation
def kill(invocation: Invocation, node: str, directory: Path) -> None:
    """Kill a node with SIGKILL, as a failing machine would be.

    \b
    Example: standbyctl local kill primary --dir /tmp/sp
    """
    process = LocalCluster(directory).kill(node)
    if invocation.output.as_json:
        invocation.output.document({"node": node, "pid": process.pid})
    else:
        invocation.output.line(f"{node} (pid {process.pid}) killed; `standbyctl local start {node}` starts it again")


@local.command()
@click.argument("node", type=click.Choice(NODES))
@dir_option
@pass_invocation
@asynchronous
async def start(invocation: Invocation, node: str, directory: Path) -> None:
    """Start a node again, on the ports it had, and wait until it serves.

    \b
    Example: standbyctl local start primary --dir /tmp/sp
    """
    cluster = LocalCluster(directory)
    started = await cluster.start(node)
    process = cluster.process(node)
    pid = process.pid if process else None
    if invocation.output.as_json:
        invocation.output.document({"node": node, "pid": pid, "started": started})
    else:
        invocation.output.line(f"{node} {'started' if started else 'runs already'} (pid {pid})")


@local.command()
@dir_option
@pass_invocation
@asynchronous
async def env(invocation: Invocation, directory: Path) -> None:
    """Print what clients and scripts need: addresses, pids, paths.

    \b
    Example: standbyctl --json local env --dir /tmp/sp
    """
    environment = await LocalCluster(directory).environment()
    if invocation.output.as_json:
        invocation.output.document(environment)
    else:
        _show(invocation.output, environment)


def _show(output: Output, environment: dict[str, Any]) -> None:
    primary, standby, backup = environment["primary"], environment["standby"], environment["backup"]
    output.table(
        ("NODE", "PID>", "GRPC", "NBD", "EXPORTS"),
        [
            ("primary", str(primary["pid"] or "down"), primary["grpc"], primary["nbd"], "VOLUME"),
            ("standby", str(standby["pid"] or "down"), standby["grpc"], standby["nbd"], "VOLUME@SNAPSHOT"),
            ("backup", str(backup["pid"] or "down"), backup["grpc"], backup["nbd"], "VOLUME@BACKUP"),
        ],
    )
    output.line()
    for name in environment["volumes"]:
        output.line(f"volume {name}: {primary['nbd']}/{name}")
    output.line(f"export STILLPOINT_CLUSTER={environment['cluster']}")
