"""standbyctl store: preservation stores, where a snapshot's old blocks go before they are overwritten."""

from __future__ import annotations

from pathlib import Path
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
        "failure": store.failure,
    }


def kind_word(kind: standby_pb2.StoreKind) -> str:
    return enum_word(standby_pb2.StoreKind.Name(kind), "STORE_KIND_")


def used_cell(store: standby_pb2.Store) -> str:
    return f"{100 * store.used_bytes // store.size}%" if store.size else "-"


async def create_store(
    nodes: Nodes, name: str, *, kind: standby_pb2.StoreKind, size: int, paths: tuple[str, ...] = ()
) -> standby_pb2.Store:
    request = standby_pb2.CreateStoreRequest(name=name, kind=kind, size=size, paths=paths)
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
@click.option("--file", "file", type=click.Path(path_type=Path), metavar="PATH", help="Keep the blocks in this file.")
@click.option("--size", type=size_type, help="How large the file may become.")
@pass_invocation
@asynchronous
async def create(invocation: Invocation, name: str, memory: int | None, file: Path | None, size: int | None) -> None:
    """Make a store in memory or in a file on the standby.

    \b
    Example: standbyctl store create fast --memory 512MiB
             standbyctl store create big --file /var/lib/stillpoint/big.store --size 50GiB
    """
    context = click.get_current_context()
    if (memory is None) == (file is None):
        raise click.UsageError("give a store either --memory SIZE or --file PATH --size SIZE", context)
    if (file is None) != (size is None):
        raise click.UsageError("--file and --size belong together; --memory has its size itself", context)
    async with invocation.nodes() as nodes:
        if file is not None and size is not None:
            made = await create_store(nodes, name, kind=standby_pb2.STORE_KIND_FILE, size=size, paths=(str(file),))
        else:
            made = await create_store(nodes, name, kind=standby_pb2.STORE_KIND_MEMORY, size=memory or 0)
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
        invocation.output.document([store_document(each) for each in stores])
        return
    invocation.output.table(
        ("STORE", "KIND", "SIZE>", "USED>", "FULL>", "WHERE", "FAILURE"),
        [
            (
                each.name,
                kind_word(each.kind),
                format_size(each.size),
                format_size(each.used_bytes),
                used_cell(each),
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
