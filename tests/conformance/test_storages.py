"""What every storage of a repository promises (`backupnode/repository/storage.py`), run on every kind."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupnode.repository.folder import DirectoryStorage
from backupnode.repository.object_storage import ObjectStorage
from backupnode.repository.storage import Storage
from stillpoint.errors import AlreadyExists, DeviceError, InUse, NotFound, Refused
from tests.support.s3 import CuttingProxy, bucket_storage

NOISE = random.Random(1).randbytes(3 << 20)

# Opens the same place once more, as another process would.
Open = Callable[[], Storage]


@pytest.fixture(params=["directory", "bucket"])
def open_place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    if request.param == "directory":
        return lambda: DirectoryStorage(tmp_path / "place")
    url, bucket = request.getfixturevalue("service"), request.getfixturevalue("bucket")
    return lambda: bucket_storage(url, bucket)


@pytest.fixture
def storage(open_place: Open) -> Iterator[Storage]:
    storage = open_place()
    assert storage.make()
    storage.create("repository", b"format")
    storage.lock("tests")
    storage.prepare()
    yield storage
    storage.close()


def upload(storage: Storage, name: str, data: bytes) -> None:
    uploading = storage.upload("packs")
    for start in range(0, len(data), 1 << 20):
        uploading.append([data[start : start + 1000], memoryview(data)[start + 1000 : start + (1 << 20)]])
    uploading.finish(f"packs/{name}")


def test_a_place_is_new_until_the_format_is_there(open_place: Open) -> None:
    assert open_place().make()
    assert open_place().make()
    storage = open_place()
    storage.create("repository", b"format")
    assert not open_place().make()


def test_a_place_that_holds_something_else_is_refused(open_place: Open) -> None:
    storage = open_place()
    storage.make()
    storage.replace("precious notes", b"of somebody")
    with pytest.raises(Refused, match="is not empty and not a repository"):
        open_place().make()
    assert storage.read("precious notes") == b"of somebody"


def test_what_was_created_is_read_by_whoever_opens_the_place(storage: Storage, open_place: Open) -> None:
    storage.create("manifests/one", b"hello")
    other = open_place()
    assert other.read("manifests/one") == b"hello"
    assert other.size("manifests/one") == 5
    assert other.names("manifests") == ["one"]


def test_nothing_is_ever_created_twice(storage: Storage) -> None:
    storage.create("manifests/one", b"first")
    with pytest.raises(AlreadyExists):
        storage.create("manifests/one", b"other")
    assert storage.read("manifests/one") == b"first"


def test_of_many_that_create_at_once_one_wins(storage: Storage) -> None:
    won: list[bytes] = []

    def attempt(data: bytes) -> None:
        try:
            storage.create("manifests/one", data)
            won.append(data)
        except AlreadyExists:
            pass

    threads = [threading.Thread(target=attempt, args=(b"number %d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [storage.read("manifests/one")]


def test_replacing_leaves_one_whole_object(storage: Storage) -> None:
    storage.replace("notes/one", b"first")
    storage.replace("notes/one", b"second, longer")
    assert storage.read("notes/one") == b"second, longer"
    assert storage.names("notes") == ["one"]


def test_names_are_sorted_and_of_their_folder(storage: Storage) -> None:
    for name in ("packs/b", "packs/a", "packs/ab", "manifests/c", "notes/a"):
        storage.create(name, b"x")
    assert storage.names("packs") == ["a", "ab", "b"]
    assert storage.names("manifests") == ["c"]


def test_a_range_is_cut_at_the_end_of_the_object(storage: Storage) -> None:
    storage.create("packs/one", NOISE)
    assert storage.read("packs/one") == NOISE
    assert storage.read("packs/one", offset=1000, length=70_000) == NOISE[1000:71_000]
    assert storage.read("packs/one", offset=len(NOISE) - 10, length=100) == NOISE[-10:]
    assert storage.read("packs/one", offset=len(NOISE) - 10) == NOISE[-10:]
    assert storage.read("packs/one", offset=len(NOISE), length=10) == b""
    assert storage.read("packs/one", offset=len(NOISE) + 10) == b""
    assert storage.read("packs/one", offset=10, length=0) == b""


def test_what_is_not_there_is_told(storage: Storage) -> None:
    for call in (storage.read, storage.size, storage.delete):
        with pytest.raises(NotFound):
            call("packs/none")


def test_what_was_deleted_is_gone(storage: Storage, open_place: Open) -> None:
    storage.create("packs/one", b"x")
    storage.delete("packs/one")
    assert open_place().names("packs") == []
    with pytest.raises(NotFound):
        storage.read("packs/one")


def test_an_upload_is_absent_until_it_is_finished(storage: Storage) -> None:
    uploading = storage.upload("packs")
    uploading.append([b"12", memoryview(b"345"), bytearray(b"6")])
    assert storage.names("packs") == []
    uploading.finish("packs/one")
    uploading.abort()
    assert storage.read("packs/one") == b"123456"


def test_an_upload_may_take_the_place_of_an_object(storage: Storage) -> None:
    storage.create("packs/one", b"cut sho")
    upload(storage, "one", NOISE)
    assert storage.read("packs/one") == NOISE


def test_an_upload_that_was_given_up_leaves_nothing(storage: Storage) -> None:
    before = storage.total_bytes()
    uploading = storage.upload("packs")
    uploading.append([NOISE])
    uploading.abort()
    uploading.abort()
    assert storage.names("packs") == [] and storage.total_bytes() == before


def test_the_size_of_everything_is_told(storage: Storage) -> None:
    before = storage.total_bytes()
    upload(storage, "one", NOISE)
    storage.create("manifests/one", b"12345")
    assert storage.total_bytes() - before == len(NOISE) + 5


def test_a_place_is_locked_until_it_is_closed(storage: Storage, open_place: Open) -> None:
    other = open_place()
    with pytest.raises(InUse):
        other.lock("somebody else")
    storage.close()
    other.lock("somebody else")
    other.close()
    other.close()


# What follows is of buckets only. A directory's crashes: tests/simulation/test_repository_crashes.py.


@pytest.fixture
def proxy(service: str) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(service)
    yield proxy
    proxy.close()


def test_more_names_than_one_answer_holds_are_all_listed(bucket: str, service: str) -> None:
    storage = bucket_storage(service, bucket)
    names = sorted(f"{number:05}" for number in range(1003))
    for name in names:
        storage.replace(f"notes/{name}", b"")
    assert storage.names("notes") == names


@pytest.mark.parametrize("kind", ["create", "upload"])
def test_a_put_that_is_cut_off_leaves_the_object_absent_or_whole(
    proxy: CuttingProxy, bucket: str, service: str, kind: str
) -> None:
    storage, direct = bucket_storage(proxy.url, bucket), bucket_storage(service, bucket)
    source = random.Random(7)
    for number in range(6):
        proxy.after, proxy.cuts = source.randrange(200, len(NOISE)), 1
        name = f"packs/{number}"
        storage.create(name, NOISE) if kind == "create" else upload(storage, str(number), NOISE)
        assert direct.read(name) == NOISE
    assert proxy.cut_count == 6


def test_a_service_that_stays_away_leaves_nothing_behind(
    proxy: CuttingProxy, bucket: str, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupnode.repository.object_storage._RETRIES_MAX", 1)
    storage, direct = bucket_storage(proxy.url, bucket), bucket_storage(service, bucket)
    proxy.after, proxy.cuts = 1_000_000, 1000
    with pytest.raises(DeviceError, match="packs/one: creating it failed"):
        storage.create("packs/one", NOISE)
    with pytest.raises(DeviceError, match="packs/two: writing it failed"):
        upload(storage, "two", NOISE)
    assert direct.names("packs") == []


def test_a_create_whose_answer_was_lost_counts_as_done(proxy: CuttingProxy, bucket: str, service: str) -> None:
    storage = bucket_storage(proxy.url, bucket)
    proxy.drop_answer, proxy.cuts = True, 1
    storage.create("manifests/one", b"the only one")
    assert proxy.cut_count == 1
    assert bucket_storage(service, bucket).read("manifests/one") == b"the only one"
    with pytest.raises(AlreadyExists):
        storage.create("manifests/one", b"another")


def test_an_owner_that_was_killed_has_its_place_again_at_once(bucket: str, service: str) -> None:
    killed = bucket_storage(service, bucket)
    killed.lock("node 1")
    again = bucket_storage(service, bucket)
    again.lock("node 1")
    again.create("manifests/one", b"x")
    wait_until_fenced(killed)
    again.create("manifests/two", b"x")
    again.close()
    killed.close()


def test_a_place_whose_owner_stays_silent_is_taken_over_and_the_owner_is_fenced(bucket: str, service: str) -> None:
    frozen, other = bucket_storage(service, bucket), bucket_storage(service, bucket)
    frozen.lock("node 1")
    lease = frozen._lease
    assert lease is not None
    lease._closing.set()  # it renews no more, as if it were stopped
    other.lock("node 2")
    with pytest.raises(InUse, match="could not be kept for this node alone"):
        frozen.create("manifests/late", b"x")
    with pytest.raises(InUse):
        frozen.replace("notes/late", b"x")
    with pytest.raises(InUse):
        frozen.delete("writer")
    with pytest.raises(InUse):
        upload(frozen, "late", b"x")
    other.create("manifests/one", b"x")
    assert other.names("manifests") == ["one"] and other.names("notes") == [] and other.names("packs") == []
    frozen.close()
    other.close()


def test_small_objects_are_read_once_until_a_check_asks_for_them_anew(bucket: str, service: str) -> None:
    storage, somebody = bucket_storage(service, bucket), bucket_storage(service, bucket)
    storage.create("manifests/one", b"first")
    storage.create("packs/one", b"first")
    assert storage.read("manifests/one") == b"first"
    somebody.replace("manifests/one", b"second")
    assert storage.read("manifests/one") == b"second", "without the lease nothing is remembered"
    storage.lock("node 1")
    assert storage.read("manifests/one") == b"second" and storage.read("packs/one") == b"first"
    somebody.replace("manifests/one", b"third")
    somebody.replace("packs/one", b"third")
    assert storage.read("manifests/one") == b"second" and storage.read("packs/one") == b"third"
    storage.forget_read()
    assert storage.read("manifests/one") == b"third"
    storage.replace("manifests/one", b"fourth")
    assert storage.read("manifests/one") == b"fourth"
    storage.delete("manifests/one")
    with pytest.raises(NotFound):
        storage.read("manifests/one")
    storage.close()


def test_a_commit_during_which_the_place_was_lost_is_taken_back(bucket: str, service: str) -> None:
    storage = bucket_storage(service, bucket)
    storage.lock("node 1")
    lease = storage._lease
    assert lease is not None
    put = storage._put

    def slow_put(*arguments: object, **options: object) -> object:
        answer = put(*arguments, **options)  # type: ignore[arg-type]
        lease._lost = True
        return answer

    storage._put = slow_put  # type: ignore[method-assign, assignment]
    with pytest.raises(InUse):
        storage.create("manifests/late", b"x")
    assert storage.names("manifests") == []
    storage.close()


def wait_until_fenced(storage: ObjectStorage) -> None:
    lease = storage._lease
    assert lease is not None
    lease._thread.join(timeout=10)
    with pytest.raises(InUse, match="taken over"):
        storage.create("manifests/late", b"x")


def test_a_directory_is_not_left_open_by_a_second_process(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path / "place")
    storage.make()
    before = len(os.listdir("/proc/self/fd"))
    storage.lock("")
    with pytest.raises(InUse):
        DirectoryStorage(tmp_path / "place").lock("")
    storage.close()
    assert len(os.listdir("/proc/self/fd")) == before
