"""standbyctl bookmark: remembered instants of volumes, the bases of incremental copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ..wire.v1 import common_pb2, standby_pb2
from .command import (
    BookmarkId,
    Group,
    Invocation,
    asynchronous,
    bookmark_identity,
    confirm,
    pass_invocation,
    yes_option,
)
from .nodes import DataNode
from .output import format_age, iso_time
from .places import from_all, where_bookmark


def bookmark_document(bookmark: standby_pb2.Bookmark) -> dict[str, Any]:
    return {
        "id": f"{bookmark.volume}@{bookmark.name}",
        "volume": bookmark.volume,
        "name": bookmark.name,
        "incarnation": bookmark.incarnation,
        "generation": bookmark.generation,
        "snapshot_uuid": bookmark.snapshot_uuid,
        "created": iso_time(bookmark.created_ns),
        "created_ns": bookmark.created_ns,
    }


@click.group(cls=Group)
def bookmark() -> None:
    """Instants of volumes, remembered without their data.

    A bookmark takes no space and never goes stale by itself: a copy made of an older snapshot is brought up to date
    with what changed since. Make one with `standbyctl snapshot delete VOLUME@NAME --bookmark NAME`. Over NBD, what
    changed is the meta context qemu:dirty-bitmap:NAME of a later snapshot.
    """


@bookmark.command("list")
@click.argument("volume", required=False)
@pass_invocation
@asynchronous
async def list_(invocation: Invocation, volume: str | None) -> None:
    """List the bookmarks, of one volume or of all.

    \b
    Example: standbyctl bookmark list vol1
    """
    async with invocation.nodes() as nodes:
        request = standby_pb2.ListBookmarksRequest(volume=volume or "")

        async def ask(node: DataNode) -> Sequence[standby_pb2.Bookmark]:
            return (await node.mirroring.call("ListBookmarks", request, standby_pb2.BookmarkList)).bookmarks

        answers = await from_all(nodes, ask)
    bookmarks = sorted(
        (each for _, part in answers for each in part), key=lambda each: (each.volume, each.generation, each.name)
    )
    if invocation.output.as_json:
        invocation.output.document([bookmark_document(each) for each in bookmarks])
        return
    invocation.output.table(
        ("BOOKMARK", "GENERATION>", "AGE>"),
        [(f"{each.volume}@{each.name}", str(each.generation), format_age(each.created_ns)) for each in bookmarks],
        empty="no bookmarks; make one with `standbyctl snapshot delete VOLUME@NAME --bookmark NAME`",
    )


@bookmark.command()
@click.argument("identity", metavar="VOLUME@NAME", type=bookmark_identity)
@yes_option
@pass_invocation
@asynchronous
async def delete(invocation: Invocation, identity: BookmarkId, yes: bool) -> None:
    """Forget a bookmark. What was copied stays; the next copy against it has to be a full one.

    \b
    Example: standbyctl bookmark delete vol1@monday
    """
    confirm(f"Delete the bookmark {identity}?", yes=yes)
    async with invocation.nodes() as nodes:
        request = standby_pb2.BookmarkName(volume=identity.volume, name=identity.name)
        node = await where_bookmark(nodes, identity.volume, identity.name)
        await node.mirroring.call("DeleteBookmark", request, common_pb2.Empty)
    if invocation.output.as_json:
        invocation.output.document({"deleted": str(identity)})
    else:
        invocation.output.line(f"bookmark {identity} deleted")
