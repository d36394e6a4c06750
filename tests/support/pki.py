"""Certificates for tests: an authority, holders of every role, and every kind of certificate that must be refused."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stillpoint.security.pki import CLIENT_USAGE, SERVER_USAGE, Authority, alternative_names, usages_of
from stillpoint.security.roles import Identity, Role
from stillpoint.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Credentials

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DAY = datetime.timedelta(days=1)


class TestPki:
    """An authority in `folder`, and folders of what it issued."""

    __test__ = False

    def __init__(self, folder: Path, *, authority: Authority | None = None) -> None:
        """authority: one that is there already."""
        self.folder = folder
        self.authority = authority or Authority.create(folder / "ca")
        folder.mkdir(exist_ok=True)
        self._count = 0

    def issue(self, role: Role, name: str = "", *, hosts: Sequence[str] = LOOPBACK) -> Path:
        """An honest certificate; its folder. The same one when asked for again."""
        name = name or f"{role.value}1"
        folder = self.folder / name
        if not folder.exists():
            self.authority.issue(Identity(role, name), folder, hosts=hosts if role.serves else ())
        return folder

    def credentials(self, role: Role, name: str = "") -> Credentials:
        return Credentials(self.issue(role, name))

    def expired(self, role: Role) -> Path:
        return self._odd(role, ended_ago=_DAY)

    def server_only(self, role: Role) -> Path:
        return self._odd(role, usages=[SERVER_USAGE])

    def without_role(self) -> Path:
        """Of our authority, for clients and servers, but no word of who it is."""
        return self._odd(None, usages=[SERVER_USAGE, CLIENT_USAGE])

    def dressed_up(self) -> Path:
        """A client's, with a DNS name that looks like an admin's URI."""
        names = [*alternative_names(Identity(Role.CLIENT, "fox"), ()), x509.DNSName("stillpoint:admin:wolf")]
        return self._odd(Role.CLIENT, names=names)

    def of_other_authority(self, role: Role) -> Path:
        """As another authority of the same name issues it; the holder itself trusts ours."""
        self._count += 1
        other = Authority.create(self.folder / f"other-ca{self._count}")
        return self._odd(role, authority=other)

    def _odd(
        self,
        role: Role | None,
        *,
        usages: Sequence[x509.ObjectIdentifier] | None = None,
        ended_ago: datetime.timedelta = -_DAY,
        authority: Authority | None = None,
        names: Sequence[x509.GeneralName] | None = None,
    ) -> Path:
        self._count += 1
        folder = self.folder / f"odd{self._count}"
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        honest = alternative_names(Identity(role or Role.DATA, "odd"), LOOPBACK)
        now = datetime.datetime.now(datetime.UTC)
        certificate = (authority or self.authority).sign(
            key.public_key(),
            "odd",
            names or (honest if role is not None else honest[1:]),
            usages=usages if usages is not None else usages_of(role or Role.DATA),
            not_before=now - 2 * _DAY,
            not_after=now - ended_ago,
        )
        write_folder(folder, self.authority.certificate, certificate, key)
        return folder


def write_folder(
    folder: Path, authority: x509.Certificate, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> None:
    pem = serialization.Encoding.PEM
    (folder / CA_FILE).write_bytes(authority.public_bytes(pem))
    (folder / CERTIFICATE_FILE).write_bytes(certificate.public_bytes(pem))
    (folder / KEY_FILE).write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    for name in (CERTIFICATE_FILE, KEY_FILE):
        (folder / f"client-{name}").symlink_to(name)
