"""standbyctl snapshot policy: how many snapshots a volume may have, and what gives way when there is no room."""

from __future__ import annotations

from typing import Any

import click

from ..config import format_size
from ..wire.v1 import standby_pb2
from .command import Command, Invocation, asynchronous, pass_invocation
from .command import size as size_type

_NONE, _DEFAULT = "none", "default"


def policy_document(policy: standby_pb2.SnapshotPolicy) -> dict[str, Any]:
    return {
        "volume": policy.volume,
        "expire": policy.expire,
        "count_max": policy.count_max,
        "preserved_bytes_max": policy.preserved_bytes_max,
        "own": list(policy.own),
        "count": policy.count,
        "preserved_bytes": policy.preserved_bytes,
    }


def _count(text: str) -> int | str:
    if text == _DEFAULT:
        return text
    if text != _NONE and not (text.isdecimal() and 0 < int(text) < 1 << 32):
        raise click.BadParameter(f"{text!r} is no number of snapshots; write a number above 0, {_NONE} or {_DEFAULT}")
    return 0 if text == _NONE else int(text)


def _bytes(text: str) -> int | str:
    if text == _DEFAULT:
        return text
    return 0 if text == _NONE else size_type(text)


def _request(
    volume: str, *, expire: str | None, count: int | str | None, room: int | str | None
) -> standby_pb2.SetSnapshotPolicyRequest:
    request = standby_pb2.SetSnapshotPolicyRequest(volume=volume)
    values: dict[str, Any] = {
        "expire": {"yes": True, "no": False}.get(expire, expire) if expire is not None else None,
        "count_max": count,
        "preserved_bytes_max": room,
    }
    for field, value in values.items():
        if value == _DEFAULT:
            request.defaults.append(field)
        elif value is not None:
            setattr(request, field, value)
    return request


@click.command(cls=Command)
@click.argument("volume", required=False)
@click.option("--count", type=_count, metavar="N", help="Most snapshots the volume may have.")
@click.option("--bytes", "room", type=_bytes, metavar="SIZE", help="Most room they may take in preservation stores.")
@click.option(
    "--expire",
    type=click.Choice(("yes", "no", _DEFAULT)),
    help="Whether the oldest snapshots are deleted when a limit is reached or a store is full.",
)
@pass_invocation
@click.pass_context
@asynchronous
async def policy(
    context: click.Context,
    invocation: Invocation,
    volume: str | None,
    count: int | str | None,
    room: int | str | None,
    expire: str | None,
) -> None:
    """Limit the snapshots of a volume, or show the limits.

    A limit is a value, `none`, or `default` for what the standby's configuration says. When one more snapshot would be
    too many, it is refused; with --expire yes the oldest one is deleted instead. When the snapshots take more room than
    they may, or their store is full, the oldest becomes invalid; with --expire yes it is deleted. Protected snapshots
    never expire, and no limit makes one invalid; only a store that is full does.

    \b
    Example: standbyctl snapshot policy vol1 --count 14 --expire yes
             standbyctl snapshot policy vol1 --bytes 200GiB
             standbyctl snapshot policy vol1 --count default
             standbyctl snapshot policy
    """
    changes = [count, room, expire]
    if volume is None and changes != [None] * 3:
        raise click.UsageError("name the volume whose limits are to change", context)
    async with invocation.nodes() as nodes:
        if volume is not None and changes != [None] * 3:
            request = _request(volume, expire=expire, count=count, room=room)
            policies = [await nodes.standby.call("SetSnapshotPolicy", request, standby_pb2.SnapshotPolicy)]
        else:
            asked = standby_pb2.ListSnapshotPoliciesRequest(volume=volume or "")
            answer = await nodes.standby.call("ListSnapshotPolicies", asked, standby_pb2.SnapshotPolicyList)
            policies = list(answer.policies)
    if invocation.output.as_json:
        documents = [policy_document(each) for each in policies]
        invocation.output.document(documents[0] if volume is not None else documents)
        return
    invocation.output.table(
        ("VOLUME", "SNAPSHOTS>", "AT MOST>", "PRESERVED>", "AT MOST>", "EXPIRE"),
        [
            (
                each.volume,
                str(each.count),
                _limit_cell(str(each.count_max) if each.count_max else _NONE, "count_max" in each.own),
                format_size(each.preserved_bytes),
                _limit_cell(
                    format_size(each.preserved_bytes_max) if each.preserved_bytes_max else _NONE,
                    "preserved_bytes_max" in each.own,
                ),
                _limit_cell("yes" if each.expire else "no", "expire" in each.own),
            )
            for each in policies
        ],
        empty="no volumes",
    )


def _limit_cell(value: str, is_own: bool) -> str:
    return value if is_own else f"{value} (default)"
