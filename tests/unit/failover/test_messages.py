"""The lines between a data node and its agent."""

from __future__ import annotations

from uuid import UUID

import pytest

from stillpoint.errors import ProtocolError
from stillpoint.failover.member import CopyState, Part, Readiness
from stillpoint.failover.messages import (
    AskPledges,
    FromAgent,
    FromNode,
    HandOver,
    Order,
    PledgeAnswer,
    PledgeAsked,
    PledgeGiven,
    Report,
    VolumeReport,
    decode_from_agent,
    decode_from_node,
    encode,
)

VOLUME = UUID(int=5)
READY = Readiness(fenced=True, resynced=True, live=True, caught_up=False)


@pytest.mark.parametrize(
    "message",
    [
        Report(12.5, ()),
        Report(12.5, (VolumeReport(VOLUME, CopyState(True, 3, False), True, ("b",), {"c": READY}),)),
        PledgeAsked(1, VOLUME, 3),
        PledgeGiven(VOLUME, "b", 11.25),
        HandOver(VOLUME, "b"),
    ],
)
def test_what_a_node_says_is_read_as_it_was_said(message: FromNode) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode_from_node(line) == message


@pytest.mark.parametrize(
    "message",
    [
        Order(VOLUME, Part.PRIMARY, 3, 12.5, frozenset("bc")),
        Order(VOLUME, Part.STANDBY, 0, float("-inf"), frozenset()),
        AskPledges(VOLUME, 3, frozenset("bc"), 12.5),
        PledgeAnswer(1, True),
    ],
)
def test_what_an_agent_says_is_read_as_it_was_said(message: FromAgent) -> None:
    assert decode_from_agent(encode(message)) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"type": "Order"}',
        b'{"type": "Report", "sent_s": 1}',
        b'{"type": "Report", "sent_s": 1, "volumes": [{}]}',
        b'{"type": "PledgeAsked", "id": 1, "volume": "x", "epoch": 1}',
        b'{"type": ["Report"]}',
        b"\xff",
    ],
)
def test_a_line_that_makes_no_sense_is_one_clear_error(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_from_node(line)
