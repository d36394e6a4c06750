"""A bucket of an S3-compatible service as a Storage, through `obstore`.

Invariants:
- An object is made by one PUT, so it is absent or whole; packs are therefore held in memory until they are complete.
- `create` is a PUT with `If-None-Match: *`. The service must honour it; `make` finds out before anything relies on it.
- One node at a time changes anything: see `lease.py`. A commit whose lease was lost meanwhile is taken back.
- While this one is that node, it remembers the small objects it has read or written, until a check asks for them anew.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from stillpoint.errors import AlreadyExists, ConfigError, DeviceError, NotFound, PermissionRefused, Refused

from .chunking import Piece
from .folder import FORMAT_FILE
from .lease import Lease
from .s3_config import S3Config

if TYPE_CHECKING:
    from obstore.store import S3Store

SCHEME: Final = "s3://"
_LEASE: Final = "writer"
# Read again and again, a few KiB each.
_SMALL: Final = ("manifests/", "notes/")
_PROBE: Final = ".probe-"
_RETRIES_MAX: Final = 6
_RETRY_TIMEOUT: Final = timedelta(seconds=60)
_FIRST_DELAY_S: Final = 0.1
_PART_BYTES: Final = 8 << 20


class ObjectStorage:
    """Made by `connect`. `lock` comes before the first write."""

    # Each request has a price and a delay, so small reads are worth joining.
    requests_are_dear = True

    def __init__(self, store: S3Store, description: str, *, lease_pace: float = 1.0) -> None:
        self.description = description
        self._store = store
        self._lease_pace = lease_pace
        self._lease: Lease | None = None
        self._remembered: dict[str, bytes] = {}
        self._turn = 0  # of changes

    @classmethod
    def connect(cls, url: str, config: S3Config, *, lease_pace: float = 1.0) -> ObjectStorage:
        """url: `s3://BUCKET/PREFIX`. Nothing is sent yet. Raises ConfigError."""
        try:
            from obstore.store import S3Store
        except ImportError:
            raise ConfigError("a repository in a bucket needs the package `obstore`; install stillpoint[s3]") from None
        bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
        if not url.startswith(SCHEME) or not bucket:
            raise ConfigError(f"{url}: a repository in a bucket is named s3://BUCKET/PREFIX")
        try:
            store = S3Store(
                bucket,
                prefix=prefix.strip("/") or None,
                client_options={"allow_http": config.endpoint.startswith("http://"), "timeout": "120 seconds"},
                retry_config={"max_retries": _RETRIES_MAX, "retry_timeout": _RETRY_TIMEOUT},
                **config.options(),
            )
        except Exception as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{url}: cannot be used: {_first_line(error)}") from None
        return cls(store, url, lease_pace=lease_pace)

    def make(self) -> bool:
        if self.exists(FORMAT_FILE):
            return False
        if any(not path.startswith(_PROBE) for path, _ in self._list("")):
            raise Refused(f"{self.description} is not empty and not a repository; name an empty prefix")
        self._check_conditions()
        return True

    def lock(self, owner: str) -> None:
        lease = Lease(_Object(self, _LEASE), self.description, owner, pace=self._lease_pace)
        lease.take()
        self._lease = lease

    def prepare(self) -> None:
        """There is nothing in the making that could be left."""

    def names(self, folder: str) -> list[str]:
        return sorted(path.rpartition("/")[2] for path, _ in self._list(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        return {path.rpartition("/")[2]: size for path, size in self._list(folder)}

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except NotFound:
            return False
        return True

    def forget_read(self) -> None:
        self._remembered.clear()

    def read(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if offset or length is not None or not self._remembers(name):
            return self._read(name, offset=offset, length=length)
        data, turn = self._remembered.get(name), self._turn
        if data is None:
            data = self._read(name, offset=0, length=None)
            # Not what another thread replaced meanwhile.
            if turn == self._turn:
                self._remembered[name] = data
        return data

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """What is read from before this until after it is not remembered."""
        self._turn += 1
        try:
            yield
        finally:
            self._turn += 1
            self._remembered.pop(name, None)

    def _remembers(self, name: str) -> bool:
        return self._lease is not None and name.startswith(_SMALL)

    def _read(self, name: str, *, offset: int, length: int | None) -> bytes:
        import obstore

        wanted: Any = {"offset": offset} if length is None else (offset, offset + length)
        if length == 0:
            return b""
        with self._errors("reading it", name):
            try:
                found = obstore.get(self._store, name, options={} if wanted == {"offset": 0} else {"range": wanted})
                return bytes(found.bytes())
            except obstore.exceptions.GenericError:
                # A range that begins beyond the end is an error there.
                if self.size(name) > offset:
                    raise
                return b""

    def size(self, name: str) -> int:
        import obstore

        with self._errors("measuring it", name):
            return int(obstore.head(self._store, name)["size"])

    def create(self, name: str, data: bytes) -> None:
        self._check_lease()
        self._create(name, data)
        try:
            self._check_lease()
        except BaseException:
            self._remove(name)
            raise

    def _create(self, name: str, data: bytes) -> None:
        for attempt in range(_RETRIES_MAX + 1):
            try:
                with self._errors("creating it", name):
                    self._put(name, data, mode="create")
                return
            except AlreadyExists:
                # Of a request that was sent again because no answer came, the first may have made it.
                if self._read(name, offset=0, length=None) != data:
                    raise
                return
            except DeviceError:
                # `obstore` itself repeats only requests that may be repeated blindly.
                if attempt == _RETRIES_MAX:
                    raise
                time.sleep(_FIRST_DELAY_S * 2**attempt)

    def replace(self, name: str, data: bytes) -> None:
        self._check_lease()
        with self._changing(name), self._errors("writing it", name):
            self._put(name, data)

    def delete(self, name: str) -> None:
        self._check_lease()
        self.size(name)  # deleting what is not there is no error there
        with self._changing(name):
            self._remove(name)

    def upload(self, folder: str, *, name: str = "") -> _BufferedUpload | _StreamedUpload:
        return _StreamedUpload(self, name) if name else _BufferedUpload(self)

    def total_bytes(self) -> int:
        return sum(size for _, size in self._list(""))

    def close(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _put(self, name: str, data: bytes | list[Piece], **options: Any) -> str | None:
        import obstore

        body: Any = data if isinstance(data, bytes) else iter([bytes(each) for each in data])
        return obstore.put(self._store, name, body, use_multipart=False, **options)["e_tag"]

    def _remove(self, name: str) -> None:
        import obstore

        with self._errors("deleting it", name):
            obstore.delete(self._store, name)

    def _list(self, folder: str) -> Iterator[tuple[str, int]]:
        """(path, size) of what is in a folder; "": of everything."""
        import obstore

        with self._errors("listing it", folder):
            for batch in obstore.list(self._store, folder or None, chunk_size=1000):
                for each in batch:
                    yield each["path"], each["size"]

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _check_conditions(self) -> None:
        """Raises Refused when the service puts over an object that it was told not to replace."""
        name = f"{_PROBE}{secrets.token_hex(8)}"
        try:
            self.create(name, b"1")
            try:
                self.create(name, b"2")
            except AlreadyExists:
                return
            raise Refused(f"{self.description}: the service ignores `If-None-Match`; backups would not be safe there")
        finally:
            with contextlib.suppress(DeviceError):
                self._remove(name)

    @contextlib.contextmanager
    def _errors(self, what: str, name: str) -> Iterator[None]:
        from obstore.exceptions import (
            AlreadyExistsError,
            BaseError,
            PermissionDeniedError,
            PreconditionError,
            UnauthenticatedError,
        )

        where = f"{self.description}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{where}: does not exist") from error
        except (AlreadyExistsError, PreconditionError) as error:
            raise AlreadyExists(f"{where}: exists already") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionRefused(f"{where}: {what} is not allowed: {_first_line(error)}") from error
        except BaseError as error:
            raise DeviceError(f"{where}: {what} failed: {_first_line(error)}", errno.EIO) from error


class _BufferedUpload:
    def __init__(self, storage: ObjectStorage) -> None:
        self._storage = storage
        self._buffers: list[Piece] = []

    def append(self, buffers: Sequence[Piece]) -> None:
        self._buffers += buffers

    def finish(self, name: str) -> None:
        try:
            self._storage._check_lease()
            with self._storage._errors("writing it", name):
                self._storage._put(name, self._buffers)
        finally:
            self.abort()

    def abort(self) -> None:
        self._buffers = []


class _StreamedUpload:
    """In parts, put together by the service when all have arrived."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        import obstore

        self._storage = storage
        self._name = name
        with storage._errors("writing it", name):
            self._writer: Any = obstore.open_writer(storage._store, name, buffer_size=_PART_BYTES, max_concurrency=2)

    def append(self, buffers: Sequence[Piece]) -> None:
        with self._storage._errors("writing it", self._name):
            for each in buffers:
                self._writer.write(bytes(each))

    def finish(self, name: str) -> None:
        assert name == self._name
        self._storage._check_lease()
        with self._storage._errors("writing it", name):
            self._writer.close()
        self._writer = None

    def abort(self) -> None:
        # The parts of one that was never closed belong to no object; a lifecycle rule of the bucket takes them away.
        self._writer = None


class _Object:
    """The lease's object."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        self._storage = storage
        self._name = name

    def load(self) -> tuple[bytes, str] | None:
        import obstore

        try:
            with self._storage._errors("reading it", self._name):
                found = obstore.get(self._storage._store, self._name)
                return bytes(found.bytes()), str(found.meta["e_tag"])
        except NotFound:
            return None

    def store(self, data: bytes, *, replacing: str | None) -> str | None:
        try:
            with self._storage._errors("writing it", self._name):
                return self._storage._put(
                    self._name, data, mode="create" if replacing is None else {"e_tag": replacing}
                )
        except (AlreadyExists, NotFound):
            found = self.load()
            return found[1] if found is not None and found[0] == data else None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
