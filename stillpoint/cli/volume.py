"""standbyctl volume: block volumes on the primary, each with its mirror on the standby."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import click

from ..config import format_size
from ..errors import InvalidRequest, StillpointError
from ..wire.v1 import common_pb2, primary_pb2
from .command import Group, Invocation, asynchronous, confirm, pass_invocation, yes_option
from .command import size as size_type
from .nodes import STATUS_TIMEOUT_S, Nodes
from .output import enum_word, format_age, iso_time
from .places import where_served

# A blank pair is in sync within moments; a longer copy goes on by itself and `status --watch` shows it.
SYNC_WAIT_S = 10.0
RESIZE_TIMEOUT_S = 600.0  # what is newly used of a disk is zeroed first

_MODES = {
    "async": primary_pb2.ACK_MODE_ASYNC,
    "sync": primary_pb2.ACK_MODE_SYNC,
    "durable": primary_pb2.ACK_MODE_DURABLE,
}


_LOSS_POLICIES = {
    "continue": primary_pb2.ON_STANDBY_LOSS_CONTINUE,
    "suspend": primary_pb2.ON_STANDBY_LOSS_SUSPEND,
    "error": primary_pb2.ON_STANDBY_LOSS_ERROR,
}
_CONGESTION = {"block": primary_pb2.CONGESTION_BLOCK, "detach": primary_pb2.CONGESTION_DETACH}


def _rate(value: str | int) -> int:
    """A size, or 0 for no limit."""
    return 0 if value in ("0", 0) else size_type(value)


def loss_policy_word(policy: primary_pb2.OnStandbyLoss) -> str:
    return enum_word(primary_pb2.OnStandbyLoss.Name(policy), "ON_STANDBY_LOSS_")


def congestion_word(policy: primary_pb2.Congestion) -> str:
    return enum_word(primary_pb2.Congestion.Name(policy), "CONGESTION_")


def writers_cell(volume: primary_pb2.Volume) -> str:
    """What stops writers, if anything does."""
    if volume.refusing:
        return f"REFUSED: {', '.join(volume.suspended) or 'no standby is in sync'}"
    if volume.suspended:
        return f"SUSPENDED ({volume.withheld_count} wait): {', '.join(volume.suspended)}"
    return ""


def mode_word(mode: primary_pb2.AckMode) -> str:
    return enum_word(primary_pb2.AckMode.Name(mode), "ACK_MODE_")


def pair_word(state: primary_pb2.PairState) -> str:
    return enum_word(primary_pb2.PairState.Name(state), "PAIR_STATE_")


def pair_cell(state: primary_pb2.PairState) -> str:
    """For tables: what is not in sync is in capitals, so that it stands out without colour too."""
    return "in sync" if state == primary_pb2.PAIR_STATE_IN_SYNC else pair_word(state).upper()


def pair_document(pair: primary_pb2.Pair) -> dict[str, Any]:
    return {
        "state": pair_word(pair.state),
        "since": iso_time(pair.since_ns),
        "detail": pair.detail,
        "dirty_bytes": pair.dirty_bytes,
        "unflushed_bytes": pair.unflushed_bytes,
        "in_flight_bytes": pair.in_flight_bytes,
        "resync_done_bytes": pair.resync_done_bytes,
        "resync_total_bytes": pair.resync_total_bytes,
        "resync_bytes_per_s": pair.resync_rate,
        "carrier": pair.carrier,
        "session": pair.session,
        "verified": iso_time(pair.verified_ns),
        "mismatch_bytes": pair.mismatch_bytes,
    }


def volume_document(volume: primary_pb2.Volume) -> dict[str, Any]:
    return {
        "name": volume.name,
        "uuid": volume.uuid,
        "size": volume.size,
        "block_size": volume.block_size,
        "mode": mode_word(volume.mode),
        "device_paths": list(volume.device_paths),
        "clients": volume.clients,
        "created": iso_time(volume.created_ns),
        "read_bytes": volume.read_bytes,
        "written_bytes": volume.written_bytes,
        "failure": volume.failure,
        "on_standby_loss": loss_policy_word(volume.on_standby_loss),
        "congestion": congestion_word(volume.congestion),
        "resync_rate": volume.resync_rate,
        "suspended": list(volume.suspended),
        "refusing": volume.refusing,
        "withheld_count": volume.withheld_count,
        "hot_bytes": volume.hot_bytes,
        "crash_resync_bytes_max": volume.crash_resync_bytes_max,
        "read_failures": volume.read_failures,
        "repaired_bytes": volume.repaired_bytes,
        "pair": pair_document(volume.pair),
    }


async def list_volumes(nodes: Nodes) -> list[primary_pb2.Volume]:
    """Those that a node serves. Raises PeerUnavailable when none is known and a node does not answer."""
    served: dict[str, primary_pb2.Volume] = {}
    silent: list[StillpointError] = []
    for node in nodes.data_nodes:
        try:
            answer = await node.serving.call(
                "ListVolumes", common_pb2.Empty(), primary_pb2.VolumeList, timeout_s=STATUS_TIMEOUT_S
            )
        except StillpointError as error:
            silent.append(error)
            continue
        served.update((volume.name, volume) for volume in answer.volumes)
    if silent and not served:
        raise silent[0]
    return sorted(served.values(), key=lambda volume: volume.name)


async def get_volume(nodes: Nodes, name: str) -> primary_pb2.Volume:
    node = await where_served(nodes, name)
    return await node.serving.call("GetVolume", primary_pb2.GetVolumeRequest(name=name), primary_pb2.Volume)


async def wait_in_sync(nodes: Nodes, name: str, *, timeout_s: float) -> primary_pb2.Volume:
    """The volume as soon as its pair is in sync, or as it is when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        volume = await get_volume(nodes, name)
        if volume.pair.state == primary_pb2.PAIR_STATE_IN_SYNC or time.monotonic() > deadline:
            return volume
        await asyncio.sleep(0.05)


@click.group(cls=Group)
def volume() -> None:
    """Volumes, each with its mirror.

    A volume is a disk that the primary serves over NBD under its name, and mirrors to the standby.
    """


@volume.command()
@click.argument("name")
@click.option("--size", type=size_type, help="Such as 10GiB. Not needed with --device: then all of the devices.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="PATH",
    help="On the primary, instead of a file; several make one volume.",
)
@click.option(
    "--mirror-device", "mirror_devices", multiple=True, metavar="PATH", help="On the standby, instead of a file."
)
@click.option("--block-size", type=size_type, help="Unit of preservation, 512 B to 1 MiB. [default: 64KiB]")
@click.option(
    "--mode",
    type=click.Choice(tuple(_MODES)),
    default="sync",
    show_default=True,
    help="When a write is answered: written here and queued (async), on both nodes (sync), durable on both (durable).",
)
@pass_invocation
@asynchronous
async def create(
    invocation: Invocation,
    name: str,
    size: int | None,
    devices: tuple[str, ...],
    mirror_devices: tuple[str, ...],
    block_size: int | None,
    mode: str,
) -> None:
    """Make a volume and its mirror, and serve it.

    \b
    Example: standbyctl volume create vol1 --size 10GiB
             standbyctl volume create db --device /dev/sdb --device /dev/sdc --mirror-device /dev/sdb
    """
    if size is None and not devices:
        raise click.UsageError(
            "say how large the volume is with --size, or name its --device", click.get_current_context()
        )
    request = primary_pb2.CreateVolumeRequest(
        name=name,
        size=size or 0,
        block_size=_block_size(block_size),
        device_paths=devices,
        mirror_device_paths=mirror_devices,
        mode=_MODES[mode],
    )
    async with invocation.nodes() as nodes:
        await nodes.primary.call("CreateVolume", request, primary_pb2.Volume)
        made = await wait_in_sync(nodes, name, timeout_s=SYNC_WAIT_S)
        if invocation.output.as_json:
            invocation.output.document(volume_document(made))
            return
        uri = nodes.cluster.nbd_uri((await where_served(nodes, name)).nbd, name)
        invocation.output.line(f"volume {name}: {format_size(made.size)} at {uri}")
        if made.pair.state != primary_pb2.PAIR_STATE_IN_SYNC:
            invocation.output.remark(f"{name} is not in sync yet; `standbyctl status --watch` shows how far it is")


def _block_size(block_size: int | None) -> int:
    # The wire has 32 bits for it; the primary checks the rest.
    if block_size is not None and block_size >= 1 << 32:
        raise InvalidRequest(f"a block size of {format_size(block_size)} is too large; it goes up to 1 MiB")
    return block_size or 0


@volume.command("list")
@pass_invocation
@asynchronous
async def list_(invocation: Invocation) -> None:
    """List the volumes.

    \b
    Example: standbyctl volume list
    """
    async with invocation.nodes() as nodes:
        volumes = await list_volumes(nodes)
    if invocation.output.as_json:
        invocation.output.document([volume_document(each) for each in volumes])
        return
    invocation.output.table(
        ("VOLUME", "SIZE>", "MODE", "PAIR", "BEHIND>", "CLIENTS>", "AGE>"),
        [
            (
                each.name,
                format_size(each.size),
                mode_word(each.mode),
                pair_cell(each.pair.state),
                format_size(each.pair.dirty_bytes),
                str(each.clients),
                format_age(each.created_ns),
            )
            for each in volumes
        ],
        empty="no volumes; make one with `standbyctl volume create NAME --size SIZE`",
    )


@volume.command()
@click.argument("name")
@pass_invocation
@asynchronous
async def show(invocation: Invocation, name: str) -> None:
    """Show one volume.

    \b
    Example: standbyctl volume show vol1
    """
    async with invocation.nodes() as nodes:
        shown = await get_volume(nodes, name)
        uri = nodes.cluster.nbd_uri(nodes.cluster.primary.nbd, name)
    if invocation.output.as_json:
        invocation.output.document(volume_document(shown))
        return
    pair = shown.pair
    invocation.output.properties(
        [
            ("volume", shown.name),
            ("uuid", shown.uuid),
            ("size", f"{format_size(shown.size)} ({shown.size} bytes)"),
            ("block size", format_size(shown.block_size)),
            ("mode", mode_word(shown.mode)),
            ("address", uri),
            ("devices", ", ".join(shown.device_paths)),
            ("failure", shown.failure or "none"),
            (
                "standby lost",
                f"{loss_policy_word(shown.on_standby_loss)}; queue full: {congestion_word(shown.congestion)}",
            ),
            ("writers", writers_cell(shown) or "served"),
            (
                "after a crash",
                f"up to {format_size(shown.crash_resync_bytes_max)} more to copy; {format_size(shown.hot_bytes)} now",
            ),
            ("pair", " ".join(filter(None, (pair_cell(pair.state), f"for {format_age(pair.since_ns)}", pair.detail)))),
            ("carrier", pair.carrier or "-"),
            ("behind", f"{format_size(pair.dirty_bytes)} to copy, {format_size(pair.unflushed_bytes)} not flushed"),
            (
                "clients",
                f"{shown.clients}; {format_size(shown.read_bytes)} read, {format_size(shown.written_bytes)} written",
            ),
            ("created", iso_time(shown.created_ns) or "-"),
        ]
    )


@volume.command()
@click.argument("name")
@click.option("--size", type=size_type, required=True, help="The new size, such as 20GiB.")
@pass_invocation
@asynchronous
async def resize(invocation: Invocation, name: str, size: int) -> None:
    """Grow a volume and its mirror, while both are in use. Snapshots keep the size they were taken with.

    The new space reads as zeroes. Clients that are connected see it when they connect again.

    \b
    Example: standbyctl volume resize vol1 --size 20GiB
    """
    async with invocation.nodes() as nodes:
        request = primary_pb2.ResizeVolumeRequest(name=name, size=size)
        node = await where_served(nodes, name)
        grown = await node.serving.call("ResizeVolume", request, primary_pb2.Volume, timeout_s=RESIZE_TIMEOUT_S)
    if invocation.output.as_json:
        invocation.output.document(volume_document(grown))
    else:
        invocation.output.line(f"volume {name} has {format_size(grown.size)}")


@volume.command("set")
@click.argument("name")
@click.option("--mode", type=click.Choice(list(_MODES)), help="When a write is answered.")
@click.option("--on-standby-loss", type=click.Choice(list(_LOSS_POLICIES)), help="What writers see without a standby.")
@click.option("--congestion", type=click.Choice(list(_CONGESTION)), help="When an async volume's queue is full.")
@click.option("--resync-rate", type=_rate, metavar="SIZE", help="Bytes a second, at most; 0: no limit.")
@pass_invocation
@asynchronous
async def set_(
    invocation: Invocation,
    name: str,
    mode: str | None,
    on_standby_loss: str | None,
    congestion: str | None,
    resync_rate: int | None,
) -> None:
    """Change how a volume answers, while it is used. What is not named stays as it is.

    \b
    --on-standby-loss continue  writes go on; what they change is remembered for the standby
                      suspend   writes wait until a standby is in sync, or `mirror resume`
                      error     writes fail
    --congestion      block     an async volume's writes wait while its queue is full
                      detach    its standby is detached, and catches up later

    \b
    Example: standbyctl volume set vol1 --mode durable --on-standby-loss suspend
    """
    request = primary_pb2.SetVolumeRequest(
        name=name,
        mode=_MODES[mode] if mode else primary_pb2.ACK_MODE_UNSPECIFIED,
        on_standby_loss=_LOSS_POLICIES[on_standby_loss] if on_standby_loss else primary_pb2.ON_STANDBY_LOSS_UNSPECIFIED,
        congestion=_CONGESTION[congestion] if congestion else primary_pb2.CONGESTION_UNSPECIFIED,
        resync_rate=resync_rate,
    )
    if not (mode or on_standby_loss or congestion or resync_rate is not None):
        raise click.UsageError("name what to change: --mode, --on-standby-loss, --congestion or --resync-rate")
    async with invocation.nodes() as nodes:
        node = await where_served(nodes, name)
        changed = await node.serving.call("SetVolume", request, primary_pb2.Volume)
    if invocation.output.as_json:
        invocation.output.document(volume_document(changed))
        return
    invocation.output.line(
        f"volume {name}: mode {mode_word(changed.mode)}, standby lost: {loss_policy_word(changed.on_standby_loss)}, "
        f"queue full: {congestion_word(changed.congestion)}, resync at "
        + (f"{format_size(changed.resync_rate)}/s at most" if changed.resync_rate else "full speed")
    )


@volume.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Also when clients are connected, and with the snapshots of its mirror.")
@yes_option
@pass_invocation
@asynchronous
async def delete(invocation: Invocation, name: str, force: bool, yes: bool) -> None:
    """Delete a volume and its mirror. Backups of it stay.

    \b
    Example: standbyctl volume delete vol1
    """
    confirm(f"Delete the volume {name} and its mirror, with everything in them?", yes=yes)
    async with invocation.nodes() as nodes:
        node = await where_served(nodes, name)
        await node.serving.call(
            "DeleteVolume", primary_pb2.DeleteVolumeRequest(name=name, force=force), common_pb2.Empty
        )
    if invocation.output.as_json:
        invocation.output.document({"deleted": name})
    else:
        invocation.output.line(f"volume {name} deleted")
