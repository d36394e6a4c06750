"""standbyctl store: preservation stores, where a snapshot's old blocks go before they are overwritten."""

from __future__ import annotations

from typing import Any

import click

from ..config import format_size
from ..wire.v1 import common_pb2, standby_pb2
from .command import Group, Invocation, asynchronous, confirm, pass_invocation, yes_option
from .command import size as size_type
from .nodes import Nodes
from .output import enum_word


def store_document(store: standby_pb2.Store) -> dict[str, Any]:
    return {
        "name": store.name,
        "uuid": store.uuid,
        "kind": kind_word(store.kind),
        "size": store.size,
        "used_bytes": store.used_bytes,
        "paths": list(store.paths),
        "map": store.map,
        "size_max": store.size_max,
        "used_percent": store.used_percent,
        "warning_percent": store.warning_percent,
        "failure": store.failure,
    }


def kind_word(kind: standby_pb2.StoreKind) -> str:
    return enum_word(standby_pb2.StoreKind.Name(kind), "STORE_KIND_")


def used_cell(store: standby_pb2.Store) -> str:
    """Of what it may become."""
    return f"{store.used_percent}%" if store.size else "-"


async def create_store(
    nodes: Nodes,
    name: str,
    *,
    kind: standby_pb2.StoreKind,
    size: int,
    paths: tuple[str, ...] = (),
    map_form: str = "",
    size_max: int = 0,
) -> standby_pb2.Store:
    request = standby_pb2.CreateStoreRequest(
        name=name, kind=kind, size=size, paths=paths, map=map_form, size_max=size_max
    )
    return await nodes.standby.call("CreateStore", request, standby_pb2.Store)


@click.group(cls=Group)
def store() -> None:
    """Preservation stores.

    That is where the standby keeps a block of a snapshot before it is overwritten.
    """


@store.command()
@click.argument("name")
@click.option(
    "--memory", type=size_type, metavar="SIZE", help="Keep the blocks in memory; gone when the standby stops."
)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="PATH",
    help="Keep the blocks in this file on the standby; several make one store.",
)
@click.option("--size", type=size_type, help="How large the files may become together.")
@click.option("--auto-extend", type=size_type, metavar="SIZE", help="Let the files grow by themselves up to this.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="PATH",
    help="Keep the blocks on this partition or disk of the standby; several make one store.",
)
@click.option(
    "--map",
    "map_form",
    type=click.Choice(("array", "hash", "ordered", "unordered")),
    help="How its snapshots remember which block is kept where. [default: array]",
)
@pass_invocation
@asynchronous
async def create(
    invocation: Invocation,
    name: str,
    memory: int | None,
    files: tuple[str, ...],
    size: int | None,
    auto_extend: int | None,
    devices: tuple[str, ...],
    map_form: str | None,
) -> None:
    """Make a store on the standby, in memory, in files or on disks.

    Any number of volumes may share it. What was on the devices is lost. The default form of map is the fastest; the
    others take less room when a store keeps few blocks of very large volumes.

    \b
    Example: standbyctl store create fast --memory 512MiB
             standbyctl store create big --file /var/lib/stillpoint/big.store --size 50GiB
             standbyctl store create disks --device /dev/sdb --device /dev/sdc1 --map hash
    """
    context = click.get_current_context()
    if [memory is not None, bool(files), bool(devices)].count(True) != 1:
        raise click.UsageError("give a store either --memory SIZE, --file PATH --size SIZE or --device PATH", context)
    if bool(files) != (size is not None):
        raise click.UsageError("--file and --size belong together; memory and devices have their sizes", context)
    if auto_extend is not None and not files:
        raise click.UsageError("--auto-extend is for stores in files", context)
    kind = standby_pb2.STORE_KIND_MEMORY if memory is not None else standby_pb2.STORE_KIND_FILE
    async with invocation.nodes() as nodes:
        made = await create_store(
            nodes,
            name,
            kind=kind,
            size=memory or size or 0,
            paths=files or devices,
            map_form=map_form or "",
            size_max=auto_extend or 0,
        )
    if invocation.output.as_json:
        invocation.output.document(store_document(made))
    else:
        invocation.output.line(f"store {name}: {format_size(made.size)} in {', '.join(made.paths) or 'memory'}")


@store.command("list")
@pass_invocation
@asynchronous
async def list_(invocation: Invocation) -> None:
    """List the stores.

    \b
    Example: standbyctl store list
    """
    async with invocation.nodes() as nodes:
        answer = await nodes.standby.call("ListStores", common_pb2.Empty(), standby_pb2.StoreList)
    stores = sorted(answer.stores, key=lambda each: each.name)
    if invocation.output.as_json:
        documents = [{**store_document(each), "reclaimable_bytes": each.reclaimable_bytes} for each in stores]
        invocation.output.document(documents)
        return
    invocation.output.table(
        ("STORE", "KIND", "SIZE>", "USED>", "RECLAIMABLE>", "FULL>", "MAP", "WHERE", "FAILURE"),
        [
            (
                each.name,
                kind_word(each.kind),
                format_size(each.size),
                format_size(each.used_bytes),
                format_size(each.reclaimable_bytes),
                used_cell(each),
                each.map,
                ", ".join(each.paths),
                each.failure,
            )
            for each in stores
        ],
        empty="no stores; make one with `standbyctl store create NAME --memory SIZE`",
    )


@store.command()
@click.argument("name")
@yes_option
@pass_invocation
@asynchronous
async def delete(invocation: Invocation, name: str, yes: bool) -> None:
    """Delete a store that no snapshot uses.

    \b
    Example: standbyctl store delete fast
    """
    confirm(f"Delete the store {name}?", yes=yes)
    async with invocation.nodes() as nodes:
        await nodes.standby.call("DeleteStore", standby_pb2.DeleteStoreRequest(name=name), common_pb2.Empty)
    if invocation.output.as_json:
        invocation.output.document({"deleted": name})
    else:
        invocation.output.line(f"store {name} deleted")


@store.command()
@click.argument("name")
@click.option("--size", type=size_type, required=True, help="The new size.")
@pass_invocation
@asynchronous
async def extend(invocation: Invocation, name: str, size: int) -> None:
    """Make a store in files larger, while it is used.

    \b
    Example: standbyctl store extend big --size 100GiB
    """
    async with invocation.nodes() as nodes:
        request = standby_pb2.ResizeStoreRequest(name=name, size=size)
        extended = await nodes.standby.call("ResizeStore", request, standby_pb2.Store)
    if invocation.output.as_json:
        invocation.output.document(store_document(extended))
    else:
        invocation.output.line(f"store {name} has {format_size(extended.size)}")
