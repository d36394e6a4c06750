"""gRPC channels and servers with the options that every Stillpoint connection needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from ..config import Address
from ..tls import Credentials
from .renewed_channel import RenewedChannel

# One data message is at most 1 MiB; a larger receive limit would only let a small compressed message grow to gigabytes.
_MESSAGE_LIMIT = 4 * 1024 * 1024

_COMMON: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    # Without a ping timeout a frozen peer is noticed after a minute.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
)

CLIENT_OPTIONS: Sequence[tuple[str, int]] = (
    *_COMMON,
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Streams of data get a connection of their own, so that control calls never wait behind them.
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    *_COMMON,
    # Two servers on one port would share its connections silently.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.max_concurrent_streams", 256),
)


def server_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    """Clients must show a certificate of our authority. Files that change are used from the next connection on."""
    used = credentials.refresh()

    def configuration() -> grpc.ServerCertificateConfiguration:
        files = credentials.files
        return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.authority)

    def fetch() -> Any:
        # gRPC calls this before each handshake, in a thread of its own; None: nothing has changed.
        nonlocal used
        if (generation := credentials.refresh()) == used:
            return None
        used = generation
        return configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)


def open_channel(address: Address, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """A channel for use on the running loop. It connects by itself, when first used and again after a loss.

    credentials: ours; the server has to show a certificate of our authority for the address's host. None: plaintext.
    """
    if credentials is None:
        return grpc.aio.insecure_channel(str(address), options=CLIENT_OPTIONS)
    return RenewedChannel(address, credentials, CLIENT_OPTIONS)
