"""The promise of both carriers of the data link."""

from __future__ import annotations

from typing import Protocol

from ..channel import Buffer, Receiver


class Link(Protocol):
    """Ordered frames to and from one peer. `stillpoint.channel.Channel` over TCP, `link.grpc.GrpcLink` over gRPC.

    The owner is a `Receiver`: it is shown the bytes that arrived, whole frames and perhaps a part of the next one.
    Everything happens on the loop. `pending_bytes` is what was sent and is still in this process; the owner bounds it.
    """

    receiver: Receiver
    pending_bytes: int

    @property
    def congested(self) -> bool: ...

    @property
    def is_closed(self) -> bool: ...

    def send(self, *buffers: Buffer) -> None:
        """Queue buffers, borrowed until `flush` returns."""
        ...

    def send_owned(self, *buffers: Buffer) -> None:
        """Queue buffers that are given up."""
        ...

    def flush(self) -> None: ...

    def poll(self, limit_s: float) -> bool:
        """Wait for bytes without going back to the loop, for at most `limit_s`. True: some came, and were shown."""
        ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...

    def abort(self, error: Exception | None = None) -> None: ...
