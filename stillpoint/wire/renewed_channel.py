"""A gRPC channel that goes on when our certificate is renewed: gRPC itself reads a client's certificate only once.

Every call looks whether the files have changed. If so a channel with the new certificate takes over; the one before
stays until its last call has ended, so a stream of hours is not cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from ..config import Address
from ..tls import Credentials


class _Life:
    """One underlying channel and how many of its calls have not ended."""

    def __init__(self, channel: grpc.aio.Channel, generation: int) -> None:
        self.channel = channel
        self.generation = generation
        self.call_count = 0


class RenewedChannel(grpc.aio.Channel):
    """Use it as any channel, on one loop."""

    def __init__(self, address: Address, credentials: Credentials, options: Sequence[tuple[str, int]]) -> None:
        self._address = address
        self._credentials = credentials
        self._options = options
        self._life = self._begin(credentials.refresh())
        self._old: set[_Life] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def _begin(self, generation: int) -> _Life:
        files = self._credentials.files
        identity = grpc.ssl_channel_credentials(files.authority, files.key, files.certificate)
        return _Life(grpc.aio.secure_channel(str(self._address), identity, options=self._options), generation)

    def call(self, kind: str, arguments: tuple[Any, ...], options: dict[str, Any], request: Any, meta: Any) -> Any:
        """Start a call on the channel of the present certificate."""
        generation = self._credentials.refresh()
        if generation != self._life.generation:
            old, self._life = self._life, self._begin(generation)
            self._old.add(old)
            self._close_if_idle(old)
        life = self._life
        started = getattr(life.channel, kind)(*arguments, **options)(*request, **meta)
        life.call_count += 1
        started.add_done_callback(lambda _: self._ended(life))
        return started

    def _ended(self, life: _Life) -> None:
        life.call_count -= 1
        self._close_if_idle(life)

    def _close_if_idle(self, life: _Life) -> None:
        if life in self._old and not life.call_count:
            self._old.discard(life)
            closing = asyncio.ensure_future(life.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    # --- grpc.aio.Channel

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "stream_stream", arguments, options)

    async def close(self, grace: float | None = None) -> None:
        old, self._old = self._old, set()
        for life in (*old, self._life):
            await life.channel.close(grace)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._life.channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._life.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._life.channel.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Method:
    """A multi-callable that finds its channel when it is called."""

    def __init__(self, owner: RenewedChannel, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._owner = owner
        self._kind = kind
        self._arguments = arguments
        self._options = options

    def __call__(self, *request: Any, **meta: Any) -> Any:
        return self._owner.call(self._kind, self._arguments, self._options, request, meta)
