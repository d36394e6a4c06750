"""The client for etcd, and failover agents as processes, against a real etcd."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import trustme

from stillpoint.errors import PeerUnavailable, ProtocolError
from stillpoint.failover.config import EtcdTls
from stillpoint.failover.etcd import Etcd
from stillpoint.failover.in_sync_set import (
    Leader,
    Members,
    Observed,
    change,
    first_leader,
    handing_over,
    is_vacant_for,
    promotion,
    reacquisition,
)
from tests.support.etcd import EtcdServer, running_etcd
from tests.support.requirements import requires_tools

pytestmark = requires_tools("etcd")

PREFIX = "/stillpoint/test"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture
def etcd(server: EtcdServer) -> Iterator[Etcd]:
    client = Etcd((server.address,), timeout_s=5)
    yield client
    client.close()


def test_a_volume_that_nobody_knows_has_no_leader_and_no_set(etcd: Etcd) -> None:
    assert etcd.read(PREFIX, uuid4()) == Observed()


def test_a_transaction_answers_with_what_it_made(etcd: Etcd) -> None:
    volume = uuid4()
    lease, ttl_s = etcd.grant(5)
    assert ttl_s >= 5
    me = Leader("a", lease)
    seen = etcd.commit(PREFIX, volume, first_leader(me, epoch=3))
    assert (seen.leader, seen.members, seen.paused) == (me, Members(3, frozenset("a")), False)
    assert seen.leader_created == seen.members_modified > 0
    assert etcd.read(PREFIX, volume) == seen
    joined = etcd.commit(PREFIX, volume, change(seen, frozenset("ab")))
    assert joined.members == Members(3, frozenset("ab"))
    assert joined.leader_created == seen.leader_created
    assert joined.members_modified > seen.members_modified


def test_a_transaction_on_what_has_changed_meanwhile_does_nothing(etcd: Etcd) -> None:
    volume = uuid4()
    lease, _ = etcd.grant(5)
    first = etcd.commit(PREFIX, volume, first_leader(Leader("a", lease), epoch=1))
    second = etcd.commit(PREFIX, volume, change(first, frozenset("ab")))
    assert etcd.commit(PREFIX, volume, change(first, frozenset("ac"))) == second
    assert etcd.commit(PREFIX, volume, first_leader(Leader("b", lease), epoch=9)) == second
    assert etcd.commit(PREFIX, volume, promotion(second, Leader("b", lease), epoch_min=0)) == second


def test_the_leader_goes_with_its_lease_and_a_member_takes_over(etcd: Etcd) -> None:
    volume = uuid4()
    old, _ = etcd.grant(60)
    mine, _ = etcd.grant(60)
    first = etcd.commit(PREFIX, volume, first_leader(Leader("a", old), epoch=1))
    etcd.commit(PREFIX, volume, change(first, frozenset("ab")))
    etcd.revoke(old)
    seen = etcd.read(PREFIX, volume)
    assert (seen.leader, seen.leader_created) == (None, 0)
    assert is_vacant_for(seen, "b")
    assert not is_vacant_for(seen, "c")
    taken = etcd.commit(PREFIX, volume, promotion(seen, Leader("b", mine), epoch_min=7))
    assert (taken.leader, taken.members) == (Leader("b", mine), Members(7, frozenset("b")))
    assert etcd.commit(PREFIX, volume, reacquisition(seen, Leader("a", mine))) == taken
    assert etcd.keep_alive(old) == 0
    assert etcd.keep_alive(mine) >= 59


def test_a_leader_that_hands_over_leaves_the_place_vacant_for_that_member_alone(etcd: Etcd) -> None:
    volume = uuid4()
    lease, _ = etcd.grant(60)
    first = etcd.commit(PREFIX, volume, first_leader(Leader("a", lease), epoch=1))
    three = etcd.commit(PREFIX, volume, change(first, frozenset("abc")))
    seen = etcd.commit(PREFIX, volume, handing_over(three, "c"))
    assert [is_vacant_for(seen, node) for node in "abc"] == [False, False, True]
    assert etcd.commit(PREFIX, volume, handing_over(three, "b")) == seen


def test_a_pause_stops_promotions_and_nothing_else(etcd: Etcd) -> None:
    volume = uuid4()
    lease, _ = etcd.grant(60)
    first = etcd.commit(PREFIX, volume, first_leader(Leader("a", lease), epoch=1))
    etcd.pause(PREFIX, paused=True)
    try:
        both = etcd.commit(PREFIX, volume, change(first, frozenset("ab")))
        assert both.paused
        assert both.members == Members(1, frozenset("ab"))
        etcd.revoke(lease)
        own, _ = etcd.grant(60)
        seen = etcd.read(PREFIX, volume)
        assert not is_vacant_for(seen, "b")
        assert etcd.commit(PREFIX, volume, promotion(seen, Leader("b", own), epoch_min=0)) == seen
    finally:
        etcd.pause(PREFIX, paused=False)
    assert is_vacant_for(etcd.read(PREFIX, volume), "b")


def test_a_leader_cannot_be_bound_to_a_lease_that_has_ended(etcd: Etcd) -> None:
    lease, _ = etcd.grant(60)
    etcd.revoke(lease)
    volume = uuid4()
    with pytest.raises(PeerUnavailable, match="lease not found"):
        etcd.commit(PREFIX, volume, first_leader(Leader("a", lease), epoch=1))
    assert etcd.read(PREFIX, volume) == Observed()


def test_an_etcd_that_is_away_is_one_clear_error_and_the_next_endpoint_is_tried(tmp_path: Path) -> None:
    with running_etcd(tmp_path / "one") as one, running_etcd(tmp_path / "two") as two:
        client = Etcd((one.address, two.address), timeout_s=2)
        volume = uuid4()
        assert client.read(PREFIX, volume) == Observed()
        one.kill()
        began = time.monotonic()
        with pytest.raises(PeerUnavailable, match="etcd did not answer"):
            client.read(PREFIX, volume)
        assert client.read(PREFIX, volume) == Observed()
        assert time.monotonic() - began < 5
        two.kill()
        for _ in range(2):
            with pytest.raises(PeerUnavailable):
                client.read(PREFIX, volume)
        client.close()


def test_etcd_over_tls_with_a_certificate_on_both_sides(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    paths = {}
    for name, issued in (
        ("server", authority.issue_cert("127.0.0.1")),
        ("client", authority.issue_cert("agent")),
        ("stranger", stranger.issue_cert("agent")),
    ):
        paths[name] = (tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(paths[name][0])
        issued.private_key_pem.write_to_path(paths[name][1])
    for name, ca in (("ca", authority), ("other-ca", stranger)):
        ca.cert_pem.write_to_path(tmp_path / f"{name}.pem")
    with running_etcd(tmp_path / "etcd", tls=(*paths["server"], tmp_path / "ca.pem")) as server:
        for ca_name, shown, admitted in (
            ("ca", paths["client"], True),
            ("ca", paths["stranger"], False),
            ("ca", (None, None), False),
            ("other-ca", paths["client"], False),
        ):
            tls = EtcdTls(tmp_path / f"{ca_name}.pem", *shown)
            client = Etcd((server.address,), timeout_s=5, tls=tls.context())
            if admitted:
                assert client.read(PREFIX, uuid4()) == Observed()
            else:
                with pytest.raises(PeerUnavailable, match="etcd did not answer"):
                    client.read(PREFIX, uuid4())
            client.close()


def test_what_is_not_ours_at_a_key_is_an_error_not_a_guess(etcd: Etcd) -> None:
    volume = uuid4()
    lease, _ = etcd.grant(60)
    etcd.commit(PREFIX, volume, first_leader(Leader("a", lease), epoch=1))
    etcd.call(
        "/v3/kv/put",
        {"key": _base64(f"{PREFIX}/volumes/{volume}/members"), "value": _base64('{"epoch": "later release"}')},
    )
    with pytest.raises(ProtocolError):
        etcd.read(PREFIX, volume)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
