"""What counts as a problem."""

import time

import pytest

from stillpoint.cli.status import ClusterState, find_notices, find_problems, require_volume, status_document
from stillpoint.config import Address
from stillpoint.errors import NotFound
from stillpoint.wire.v1 import backup_pb2, export_pb2, primary_pb2, standby_pb2

IN_SYNC = primary_pb2.Pair(state=primary_pb2.PAIR_STATE_IN_SYNC)


def healthy(**volumes: primary_pb2.Pair) -> ClusterState:
    """All nodes answer; the volumes have these pairs."""
    return ClusterState(
        primary=primary_pb2.PrimaryStatus(
            volumes=[primary_pb2.Volume(name=name, size=1 << 20, pair=pair) for name, pair in volumes.items()]
        ),
        standby=standby_pb2.StandbyStatus(
            mirrors=[standby_pb2.Mirror(volume=name, state=standby_pb2.MIRROR_STATE_IN_SYNC) for name in volumes]
        ),
        export=export_pb2.ExportStatus(),
        backup=backup_pb2.BackupStatus(),
        addresses={name: Address("127.0.0.1", 1) for name in ("primary", "standby", "standby's export", "backup node")},
    )


def test_all_nodes_up_and_all_pairs_in_sync_is_healthy() -> None:
    state = healthy(a=IN_SYNC, b=IN_SYNC)
    assert find_problems(state) == []
    assert status_document(state, None)["healthy"] is True


def test_a_disconnected_pair_is_a_problem_that_says_how_much_the_standby_lacks() -> None:
    pair = primary_pb2.Pair(
        state=primary_pb2.PAIR_STATE_DISCONNECTED,
        dirty_bytes=5 << 20,
        since_ns=time.time_ns() - 130 * 10**9,
        detail="connection refused",
    )
    [problem] = find_problems(healthy(a=pair, b=IN_SYNC))
    assert problem == "a is NOT IN SYNC, the standby lacks 5 MiB, apart for 2m: connection refused"


def test_a_disconnected_pair_without_a_write_since_has_nothing_to_copy() -> None:
    [problem] = find_problems(healthy(a=primary_pb2.Pair(state=primary_pb2.PAIR_STATE_DISCONNECTED)))
    assert problem == "a is NOT IN SYNC, nothing to copy yet"


def test_a_syncing_pair_is_a_problem_with_the_time_left() -> None:
    pair = primary_pb2.Pair(state=primary_pb2.PAIR_STATE_SYNCING, dirty_bytes=100 << 20, resync_rate=50 << 20)
    [problem] = find_problems(healthy(a=pair))
    assert problem == "a is NOT IN SYNC, syncing, 100 MiB to go, 50 MiB/s, 2.0 s left"


def test_what_the_backup_node_has_trouble_with_is_a_problem_of_the_whole_cluster() -> None:
    state = healthy(a=IN_SYNC)
    state.backup = backup_pb2.BackupStatus(problems=["schedule a: the last run failed: no standby"])
    assert find_problems(state) == ["schedule a: the last run failed: no standby"]
    assert find_problems(state, "a") == []


def test_a_pair_of_unknown_state_is_not_healthy() -> None:
    assert find_problems(healthy(a=primary_pb2.Pair()))


def test_only_the_volume_asked_for_is_judged() -> None:
    state = healthy(good=IN_SYNC, bad=primary_pb2.Pair(state=primary_pb2.PAIR_STATE_DISCONNECTED))
    assert find_problems(state, "good") == []
    assert len(find_problems(state, "bad")) == 1


def test_a_node_that_does_not_answer_is_the_first_problem() -> None:
    state = healthy(a=primary_pb2.Pair(state=primary_pb2.PAIR_STATE_DISCONNECTED))
    state.backup = None
    state.unreachable["backup node"] = "the backup node cannot be reached"
    problems = find_problems(state)
    assert problems[0] == "the backup node cannot be reached"
    assert len(problems) == 2
    document = status_document(state, None)
    assert document["nodes"]["backup"] == {
        "up": False,
        "address": "127.0.0.1:1",
        "error": "the backup node cannot be reached",
    }


def test_a_failed_device_a_failed_mirror_and_a_failed_store_are_problems() -> None:
    state = healthy(a=IN_SYNC)
    assert state.primary and state.standby
    state.primary.volumes[0].failure = "write: I/O error"
    state.standby.mirrors[0].state = standby_pb2.MIRROR_STATE_FAILED
    state.standby.stores.add(name="s", size=100, failure="read: I/O error")
    assert len(find_problems(state)) == 3


@pytest.mark.parametrize(
    ("level", "line"),
    [
        (0, None),
        (70, "store s is 77% full"),
        (85, "store s is 77% full; delete snapshots"),
        (95, "store s is 77% full, and when it is full the oldest snapshots are lost; delete snapshots"),
    ],
)
def test_a_store_that_fills_up_is_worth_a_note_and_then_a_problem(level: int, line: str | None) -> None:
    state = healthy()
    assert state.standby
    # Percent of what it may become: the level is the standby's to say, not to be computed again from the size.
    state.standby.stores.add(
        name="s",
        kind=standby_pb2.STORE_KIND_MEMORY,
        size=100,
        used_bytes=100,
        used_percent=77,
        warning_percent=level,
    )
    assert find_problems(state) == ([line] if level >= 85 else [])
    assert find_notices(state) == ([line] if level == 70 else [])
    assert status_document(state, None)["notices"] == find_notices(state)


def test_a_volume_that_no_node_serves_is_a_problem_with_a_remedy() -> None:
    state = healthy()
    assert state.standby
    state.standby.mirrors.add(volume="lost", state=standby_pb2.MIRROR_STATE_DISCONNECTED)
    (problem,) = find_problems(state)
    assert "standbyctl promote lost" in problem
    state.promoted = primary_pb2.PrimaryStatus(volumes=[primary_pb2.Volume(name="lost", pair=IN_SYNC)])
    assert find_problems(state) == []


def test_a_volume_nobody_knows_is_not_found() -> None:
    with pytest.raises(NotFound, match="there is no volume x"):
        require_volume(healthy(a=IN_SYNC), "x")
    require_volume(healthy(a=IN_SYNC), "a")
