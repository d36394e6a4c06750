"""What an operator is told when it is the certificates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from stillpoint.cli.nodes import Node
from stillpoint.config import Address
from stillpoint.errors import PeerUnavailable
from stillpoint.runtime import serve_grpc
from stillpoint.security.roles import Role
from stillpoint.tls import Credentials
from stillpoint.wire.v1 import common_pb2, primary_pb2, primary_pb2_grpc
from tests.support.pki import TestPki


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (lambda pki: None, "it may want a certificate"),
        (lambda pki: Credentials(pki.of_other_authority(Role.ADMIN)), "or one of another authority"),
        (
            lambda pki: Credentials(pki.expired(Role.ADMIN)),
            "expired at .* renew it with `standbyctl pki issue --renew`",
        ),
    ],
)
def test_a_node_that_accepts_no_certificate_of_ours_gets_a_hint(
    tmp_path: Path, ours: Callable[[TestPki], Credentials | None], says: str
) -> None:
    pki = TestPki(tmp_path)

    async def story() -> None:
        server = await serve_grpc(Address("127.0.0.1", 0), lambda _: None, [], pki.credentials(Role.DATA))
        address = Address("127.0.0.1", server.address.port)
        node = Node("primary", address, primary_pb2_grpc.PrimaryServiceStub, ours(pki))
        try:
            with pytest.raises(PeerUnavailable, match=says) as caught:
                await node.call("GetStatus", common_pb2.Empty(), primary_pb2.PrimaryStatus)
            assert len(str(caught.value).splitlines()) == 1
        finally:
            await node.channel.close()
            await server.stop(grace_s=0)

    asyncio.run(story())
