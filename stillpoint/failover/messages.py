"""What a data node and its failover agent tell each other over a Unix socket: a JSON object a line. Bytes and values.

Both run on one machine and share its monotonic clock (`time.monotonic`), so a deadline means the same to both.

Node to agent
    Report        the heartbeat, several times a second and whenever something changes: all there is to know, each time
    PledgeAsked   a primary elsewhere asks this node for a pledge; the node's own RPC brought the question
    PledgeGiven   a node elsewhere said yes to what AskPledges wanted
    HandOver      the node has stopped; another is to be primary
Agent to node
    Order         for one volume, when it changed: what the node is, until when, and whom its writes wait for
    AskPledges    ask these nodes, and report who says yes
    PledgeAnswer  to PledgeAsked
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from stillpoint.errors import ProtocolError

from .member import CopyState, Part, Readiness

LINE_SIZE_MAX = 1 << 20

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class VolumeReport:
    """serving: it answers clients, or may be about to. lost: standbys that do not answer. ready: those that do, and how
    far each is."""

    volume: UUID
    copy: CopyState
    serving: bool = False
    lost: tuple[str, ...] = ()
    ready: dict[str, Readiness] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """sent_s: when all this was true, and the data path had just done a read and a write."""

    sent_s: float
    volumes: tuple[VolumeReport, ...]


@dataclass(frozen=True, slots=True)
class PledgeAsked:
    id: int
    volume: UUID
    epoch: int


@dataclass(frozen=True, slots=True)
class PledgeGiven:
    """sent_s: of the AskPledges that it answers."""

    volume: UUID
    node: str
    sent_s: float


@dataclass(frozen=True, slots=True)
class HandOver:
    volume: UUID
    to: str


@dataclass(frozen=True, slots=True)
class Order:
    """The node answers reads and admits writes while it is PRIMARY and before `serves_until_s`, and looks right before
    each; a write is answered when all of `awaited` have acknowledged it. STOPPED: it has to become a standby again."""

    volume: UUID
    part: Part
    epoch: int
    serves_until_s: float
    awaited: frozenset[str]


@dataclass(frozen=True, slots=True)
class AskPledges:
    volume: UUID
    epoch: int
    nodes: frozenset[str]
    sent_s: float


@dataclass(frozen=True, slots=True)
class PledgeAnswer:
    id: int
    given: bool


FromNode = Report | PledgeAsked | PledgeGiven | HandOver
FromAgent = Order | AskPledges | PledgeAnswer


def encode(message: FromNode | FromAgent) -> bytes:
    return json.dumps({"type": type(message).__name__, **dataclasses.asdict(message)}, default=_plain).encode() + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, frozenset):
        return sorted(value)
    assert isinstance(value, Part)
    return value.value


def decode_from_node(line: bytes) -> FromNode:
    """Raises ProtocolError."""
    kinds: dict[str, Callable[[dict[str, Any]], FromNode]] = {
        "Report": _report,
        "PledgeAsked": _pledge_asked,
        "PledgeGiven": _pledge_given,
        "HandOver": _hand_over,
    }
    return _decode(line, kinds)


def decode_from_agent(line: bytes) -> FromAgent:
    """Raises ProtocolError."""
    kinds: dict[str, Callable[[dict[str, Any]], FromAgent]] = {
        "Order": _order,
        "AskPledges": _ask_pledges,
        "PledgeAnswer": _pledge_answer,
    }
    return _decode(line, kinds)


def _decode(line: bytes, kinds: dict[str, Callable[[dict[str, Any]], M]]) -> M:
    try:
        fields = json.loads(line)
        return kinds[fields["type"]](fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"a line between a node and its failover agent makes no sense: {error!r}") from None


def _report(fields: dict[str, Any]) -> Report:
    return Report(float(fields["sent_s"]), tuple(_volume_report(report) for report in fields["volumes"]))


def _volume_report(fields: dict[str, Any]) -> VolumeReport:
    copy = fields["copy"]
    return VolumeReport(
        UUID(fields["volume"]),
        CopyState(bool(copy["promotable"]), int(copy["epoch"]), bool(copy["first"])),
        bool(fields["serving"]),
        tuple(str(node) for node in fields["lost"]),
        {str(node): Readiness(**readiness) for node, readiness in fields["ready"].items()},
    )


def _pledge_asked(fields: dict[str, Any]) -> PledgeAsked:
    return PledgeAsked(int(fields["id"]), UUID(fields["volume"]), int(fields["epoch"]))


def _pledge_given(fields: dict[str, Any]) -> PledgeGiven:
    return PledgeGiven(UUID(fields["volume"]), str(fields["node"]), float(fields["sent_s"]))


def _hand_over(fields: dict[str, Any]) -> HandOver:
    return HandOver(UUID(fields["volume"]), str(fields["to"]))


def _order(fields: dict[str, Any]) -> Order:
    return Order(
        UUID(fields["volume"]),
        Part(fields["part"]),
        int(fields["epoch"]),
        float(fields["serves_until_s"]),
        frozenset(fields["awaited"]),
    )


def _ask_pledges(fields: dict[str, Any]) -> AskPledges:
    return AskPledges(UUID(fields["volume"]), int(fields["epoch"]), frozenset(fields["nodes"]), float(fields["sent_s"]))


def _pledge_answer(fields: dict[str, Any]) -> PledgeAnswer:
    return PledgeAnswer(int(fields["id"]), bool(fields["given"]))
