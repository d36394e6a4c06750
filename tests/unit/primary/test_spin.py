"""When it pays to look for an acknowledgement instead of sleeping."""

from __future__ import annotations

from primary.spin import Spin, no_processor_is_free

A, B = object(), object()


def spin_of(*, limit_s: float = 1e-4, crowded: bool = False) -> Spin:
    return Spin(limit_s, crowded_machine=lambda: crowded)


def alone(spin: Spin, client: object = A, count: int = 40) -> bool:
    """Whether the last of some requests of one client is worth it."""
    return [spin.pays(client) for _ in range(count)][-1]


def test_one_connection_alone_is_looked_for_after_a_while() -> None:
    spin = spin_of()
    assert not any(spin.pays(A) for _ in range(32))
    assert spin.pays(A)


def test_two_connections_that_take_turns_never_are() -> None:
    spin = spin_of()
    assert not any(spin.pays(client) for _ in range(200) for client in (A, B))


def test_a_second_request_in_flight_ends_it() -> None:
    spin = spin_of()
    assert alone(spin)
    spin.crowded()
    assert not spin.pays(A)


def test_each_time_in_vain_it_rests_for_longer_and_success_is_forgiving() -> None:
    spin = spin_of()
    assert alone(spin)
    rests = []
    for _ in range(12):
        spin.done(came=False)
        rest = 0
        while not spin.pays(A):
            rest += 1
        rests.append(rest)
    assert rests == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 8192, 8192]
    spin.done(came=True)
    assert spin.pays(A)
    spin.done(came=False)
    assert [spin.pays(A) for _ in range(17)] == [False] * 16 + [True]


def test_it_can_be_turned_off() -> None:
    assert not alone(spin_of(limit_s=0.0), count=1000)


def test_a_crowded_machine_is_left_alone() -> None:
    spin = spin_of(crowded=True)
    assert sum(spin.pays(A) for _ in range(3000)) < 200


def test_whether_a_processor_is_free_can_be_told_here() -> None:
    assert no_processor_is_free() in (True, False)
