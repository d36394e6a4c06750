"""Certificates in use: read from a folder, read again when they change, and shown in handshakes on raw sockets.

Invariants
- Both sides show a certificate of the same authority, or there is no connection. TLS 1.3 only.
- No session is resumed: a resumed one would not look at the certificate again, and an expired one would live on.
- A handshake begins on a raw socket of which nothing was read that has not been dealt with; see `Channel.detach`.
- Certificates that cannot be read leave those in use as they are, and a warning in the log.
- What is reached from other machines is never served in plaintext by oversight: `check_listener`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import ssl
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .config import TlsConfig
from .errors import ConfigError, PeerUnavailable, PermissionRefused
from .security.roles import Identity, identity_in
from .tls_socket import TlsSocket

if TYPE_CHECKING:
    from cryptography import x509

logger = logging.getLogger(__name__)

CA_FILE: Final = "ca-cert.pem"
CERTIFICATE_FILE: Final = "cert.pem"
KEY_FILE: Final = "key.pem"
_FILES: Final = (CA_FILE, CERTIFICATE_FILE, KEY_FILE)

HANDSHAKE_TIMEOUT_S: Final = 5.0

# (inode, size, time of change) of each file; a rename changes it even within one tick of the clock.
_Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """What the three files hold, as PEM."""

    authority: bytes
    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class _Loaded:
    files: CertificateFiles
    server: ssl.SSLContext
    client: ssl.SSLContext


class Credentials:
    """Our certificate and key, and the authority whose certificates we accept. May be used from any thread.

    `generation` grows when other files took the place of those before.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError when the files are not there, unreadable, or do not belong together."""
        self.folder = folder
        self.generation = 1
        self._lock = threading.Lock()
        self._signature = _signature(folder)
        self._loaded = _load(folder)

    def refresh(self) -> int:
        """Look whether the files have changed; the generation then in use."""
        with self._lock:
            try:
                signature = _signature(self.folder)
                if signature == self._signature:
                    return self.generation
                self._signature = signature  # a set that cannot be used is complained of once, not at every connection
                self._loaded = _load(self.folder)
            except ConfigError as error:
                logger.warning("the certificates changed and cannot be used; the ones before stay: %s", error)
                return self.generation
            self.generation += 1
            logger.info("certificates read again", extra={"folder": str(self.folder), "generation": self.generation})
            return self.generation

    @property
    def files(self) -> CertificateFiles:
        """Those in use, which belong together."""
        return self._loaded.files

    @property
    def certificate_pem(self) -> bytes:
        return self.files.certificate

    def server_context(self) -> ssl.SSLContext:
        """For one connection that is about to begin."""
        self.refresh()
        return self._loaded.server

    def client_context(self) -> ssl.SSLContext:
        self.refresh()
        return self._loaded.client

    @property
    def identity(self) -> Identity | None:
        from .security.pki import identity_of

        return identity_of(_parse(self.certificate_pem))

    @property
    def not_after(self) -> datetime:
        """When our certificate expires."""
        return _parse(self.certificate_pem).not_valid_after_utc

    def check_valid(self) -> None:
        """Raises ConfigError when our certificate has expired, is not valid yet, or names no identity."""
        certificate = _parse(self.certificate_pem)
        now = datetime.now(UTC)
        where = self.folder / CERTIFICATE_FILE
        if now > certificate.not_valid_after_utc:
            raise ConfigError(
                f"{where} expired at {certificate.not_valid_after_utc:%F %T} UTC; "
                "renew it with `standbyctl pki issue --renew`"
            )
        if now < certificate.not_valid_before_utc:
            raise ConfigError(
                f"{where} is not valid before {certificate.not_valid_before_utc:%F %T} UTC; is the clock right?"
            )
        if self.identity is None:
            raise ConfigError(f"{where} names no role; issue it with `standbyctl pki issue`")


def open_credentials(config: TlsConfig | None) -> Credentials | None:
    """The credentials of a node: usable now, or ConfigError. None when it has none, which the log then says."""
    if config is None:
        logger.warning("no certificates are configured: everything travels in plaintext, on loopback only")
        return None
    credentials = Credentials(config.directory)
    credentials.check_valid()
    logger.info(
        "certificate in use",
        extra={"identity": str(credentials.identity), "not_after": credentials.not_after.isoformat()},
    )
    return credentials


def _parse(pem: bytes) -> x509.Certificate:
    # Only here: nearly all of what standbyctl does goes without the library, and starts sooner.
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem)


def _signature(folder: Path) -> _Signature:
    try:
        stats = [os.stat(folder / name) for name in _FILES]
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}; certificates come from `standbyctl pki issue`"
        ) from None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _load(folder: Path) -> _Loaded:
    try:
        authority, certificate, key = ((folder / name).read_bytes() for name in _FILES)
        server = _context(folder, authority, ssl.PROTOCOL_TLS_SERVER)
        client = _context(folder, authority, ssl.PROTOCOL_TLS_CLIENT)
    except ssl.SSLError as error:
        raise ConfigError(f"the certificates in {folder} cannot be used: {tls_reason(error)}") from None
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"the certificates in {folder} cannot be used: {error}") from None
    server.verify_mode = ssl.CERT_REQUIRED
    server.num_tickets = 0
    client.check_hostname = True
    return _Loaded(CertificateFiles(authority, certificate, key), server, client)


def _context(folder: Path, authority: bytes, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # No password: for a key that has one, OpenSSL would ask on the terminal.
    context.load_cert_chain(folder / CERTIFICATE_FILE, folder / KEY_FILE, password=lambda: "")
    context.load_verify_locations(cadata=authority.decode("ascii"))
    return context


# --- handshakes


async def server_handshake(
    sock: socket.socket, credentials: Credentials, *, timeout_s: float | None = HANDSHAKE_TIMEOUT_S
) -> TlsSocket:
    """The accepted socket as TLS, once the client has shown a certificate of our authority.

    The socket is given up: closed on error. timeout_s: None for no limit. Raises PermissionRefused for a client that
    shows none or another one, PeerUnavailable when it goes or takes too long.
    """
    return await _handshake(sock, credentials.server_context(), "", timeout_s)


async def client_handshake(
    sock: socket.socket, credentials: Credentials, host: str, *, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> TlsSocket:
    """The connected socket as TLS, once the server has proved to be `host`, by a certificate of our authority.

    A server that refuses our certificate says so after the handshake: the first receive fails then. Errors as above.
    """
    return await _handshake(sock, credentials.client_context(), host, timeout_s)


async def _handshake(sock: socket.socket, context: ssl.SSLContext, host: str, timeout_s: float | None) -> TlsSocket:
    secured = TlsSocket(sock, context, host=host)
    try:
        async with asyncio.timeout(timeout_s):
            while not _step(secured):
                await _until_ready(secured.fileno(), for_writing=secured.has_unsent)
    except TimeoutError:
        secured.close()
        raise PeerUnavailable(f"no TLS handshake within {timeout_s:g} s") from None
    except ssl.SSLError as error:
        secured.close()
        raise PermissionRefused(f"TLS refused: {tls_reason(error)}") from None
    except OSError as error:
        secured.close()
        raise PeerUnavailable(f"the connection ended in the TLS handshake: {error.strerror or error}") from None
    except BaseException:
        secured.close()
        raise
    return secured


def _step(secured: TlsSocket) -> bool:
    """Go on with the handshake; whether it is complete."""
    try:
        secured.shake_hands()
    except BlockingIOError:
        return False
    return True


async def _until_ready(descriptor: int, *, for_writing: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if for_writing else (loop.add_reader, loop.remove_reader)
    add(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        remove(descriptor)


def tls_reason(error: ssl.SSLError) -> str:
    """Why OpenSSL refused, in words: "certificate has expired", "peer did not return a certificate"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or error.strerror or str(error)).replace("_", " ").lower()


def peer_identity(sock: TlsSocket) -> Identity | None:
    """Who the peer is, by the certificate it showed; None for one without a role."""
    names = sock.peer_certificate().get("subjectAltName", ())
    return identity_in(value for kind, value in names if kind == "URI")


# --- plaintext


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine reaches the listening socket."""
    if sock.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def check_listener(sock: socket.socket, credentials: Credentials | None, what: str) -> None:
    """Raises ConfigError for a listener that would serve other machines in plaintext."""
    if credentials is None and not is_loopback(sock):
        raise ConfigError(
            f"{what} listens on {sock.getsockname()[0]}, which other machines reach, and there are no certificates; "
            "configure `tls: {directory: …}` (see `standbyctl pki`), or listen on 127.0.0.1"
        )
