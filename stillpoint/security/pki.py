"""A certificate authority in a folder, and the certificates it issues: EC P-256, one folder for each holder.

    DIR/ca-cert.pem   ca-key.pem                    the authority; the key stays here and is for its user alone
    FOLDER/ca-cert.pem   cert.pem   key.pem         what a holder gets; key.pem is for its user alone
    FOLDER/client-cert.pem   client-key.pem         links to the two, the names that libnbd and qemu look for

Invariants
- Nothing that is there is overwritten; a renewal replaces `cert.pem` by a rename and keeps the key, so whoever reads
  the folder meanwhile finds a certificate and a key that belong together.
- A key is never readable to others, not even while it is being written.
- A holder's folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..document import fsync_folder
from ..errors import AlreadyExists, DataCorrupt, InvalidRequest, NotFound, StillpointError
from .roles import Identity, Role, identity_in

CA_CERTIFICATE: Final = "ca-cert.pem"
CA_KEY: Final = "ca-key.pem"
CERTIFICATE: Final = "cert.pem"
KEY: Final = "key.pem"
_LINKS: Final = {"client-cert.pem": CERTIFICATE, "client-key.pem": KEY}

CA_LIFETIME: Final = datetime.timedelta(days=3650)
LIFETIME: Final = datetime.timedelta(days=90)
# A holder's clock may be this much behind ours.
_CLOCK_SKEW: Final = datetime.timedelta(minutes=5)

SERVER_USAGE: Final = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_USAGE: Final = ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True, slots=True)
class Issued:
    folder: Path
    identity: Identity
    hosts: tuple[str, ...]
    not_after: datetime.datetime


class Authority:
    """Opened by `create` or `open`."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.folder = folder
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(
        cls, folder: Path, *, name: str = "Stillpoint CA", lifetime: datetime.timedelta = CA_LIFETIME
    ) -> Authority:
        """Raises AlreadyExists, StillpointError."""
        for file in (CA_CERTIFICATE, CA_KEY):
            if (folder / file).exists():
                raise AlreadyExists(f"{folder / file} is there already; name another folder to make a new authority")
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        except ValueError as error:
            raise InvalidRequest(f"{name[:80]!r} cannot be an authority's name: {error}") from None
        now = _now()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        with _errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write_new(folder / CA_KEY, _key_pem(key), mode=0o600)
            _write_new(folder / CA_CERTIFICATE, _pem(certificate), mode=0o644)
            fsync_folder(folder)
        return cls(folder, certificate, key)

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Raises NotFound, DataCorrupt, StillpointError."""
        if not (folder / CA_KEY).exists():
            raise NotFound(f"there is no certificate authority in {folder}; make one with `standbyctl pki init`")
        with _errors(folder):
            certificate = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
            key = _load_key(folder / CA_KEY)
        if certificate.public_key() != key.public_key():
            raise DataCorrupt(f"{folder / CA_KEY} is not the key of {folder / CA_CERTIFICATE}")
        return cls(folder, certificate, key)

    def issue(
        self, identity: Identity, folder: Path, *, hosts: Sequence[str] = (), lifetime: datetime.timedelta = LIFETIME
    ) -> Issued:
        """Make a key and a certificate in a new folder; all of it durable on return.

        hosts: DNS names and IP addresses under which a node is reached. Raises AlreadyExists, InvalidRequest.
        """
        if identity.role.serves and not hosts:
            raise InvalidRequest(
                f"{identity}: a node's certificate names the hosts it is reached by; give at least one --host"
            )
        if folder.exists() or folder.is_symlink():
            raise AlreadyExists(f"{folder} is there already; `--renew` renews the certificate in it")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certify(key, identity, hosts, lifetime)
        with _errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                _write_new(fresh / KEY, _key_pem(key), mode=0o600)
                _write_new(fresh / CERTIFICATE, _pem(certificate), mode=0o644)
                _write_new(fresh / CA_CERTIFICATE, _pem(self.certificate), mode=0o644)
                for link, target in _LINKS.items():
                    (fresh / link).symlink_to(target)
                fsync_folder(fresh)
                fresh.chmod(0o755)
                fresh.rename(folder)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            fsync_folder(folder.parent)
        return Issued(folder, identity, tuple(hosts), certificate.not_valid_after_utc)

    def renew(self, folder: Path, identity: Identity, *, lifetime: datetime.timedelta = LIFETIME) -> Issued:
        """Replace the holder's certificate in its folder by one of the same hosts and key that lasts longer.

        Raises NotFound, and InvalidRequest when the certificate there is not one of ours for `identity`.
        """
        if not (folder / CERTIFICATE).exists():
            raise NotFound(f"there is no certificate in {folder} to renew")
        with _errors(folder):
            old = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes())
            key = _load_key(folder / KEY)
        hosts = hosts_of(old)
        if identity_of(old) != identity:
            raise InvalidRequest(f"{folder / CERTIFICATE} is of {identity_of(old) or 'nobody'}, not of {identity}")
        if old.issuer != self.certificate.subject or not _signed_by(old, self.certificate):
            raise InvalidRequest(f"{folder / CERTIFICATE} was issued by another authority; issue a new one")
        certificate = self._certify(key, identity, hosts, lifetime)
        with _errors(folder):
            fresh = folder / f".{CERTIFICATE}.new"
            fresh.unlink(missing_ok=True)
            _write_new(fresh, _pem(certificate), mode=0o644)
            fresh.rename(folder / CERTIFICATE)
            fsync_folder(folder)
        return Issued(folder, identity, tuple(hosts), certificate.not_valid_after_utc)

    def _certify(
        self, key: ec.EllipticCurvePrivateKey, identity: Identity, hosts: Sequence[str], lifetime: datetime.timedelta
    ) -> x509.Certificate:
        now = _now()
        return self.sign(
            key.public_key(),
            str(identity),
            alternative_names(identity, hosts),
            usages=usages_of(identity.role),
            not_before=now - _CLOCK_SKEW,
            not_after=now + lifetime,
        )

    def sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        names: Sequence[x509.GeneralName],
        *,
        usages: Sequence[x509.ObjectIdentifier],
        not_before: datetime.datetime,
        not_after: datetime.datetime,
    ) -> x509.Certificate:
        """Any holder's certificate. Raises InvalidRequest for one that would outlive this authority."""
        if not_after > self.certificate.not_valid_after_utc:
            end = self.certificate.not_valid_after_utc
            raise InvalidRequest(
                f"{common_name}: the certificate would outlive its authority, which ends at {end:%F %T} UTC"
            )
        issuer_key = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def usages_of(role: Role) -> list[x509.ObjectIdentifier]:
    """A node is a server to some and a client of others; a client that shows its certificate is never a server."""
    return [SERVER_USAGE, CLIENT_USAGE] if role.serves else [CLIENT_USAGE]


def alternative_names(identity: Identity, hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Raises InvalidRequest for a host that is none."""
    return [x509.UniformResourceIdentifier(identity.uri), *map(_host_name, hosts)]


def identity_of(certificate: x509.Certificate) -> Identity | None:
    return identity_in(_alternative_names(certificate).get_values_for_type(x509.UniformResourceIdentifier))


def hosts_of(certificate: x509.Certificate) -> list[str]:
    names = _alternative_names(certificate)
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])


def _signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it is not theirs
        return False
    return True


def _host_name(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        if not host or ":" in host or "/" in host or " " in host:
            raise ValueError("a DNS name or an IP address is wanted, without a port")
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except (ValueError, UnicodeError) as error:
        raise InvalidRequest(f"{host[:80]!r} is not a host name: {error}") from None


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataCorrupt(f"{path} is not an elliptic curve key")
    return key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask
        file.write(data)
        file.flush()
        os.fsync(descriptor)


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StillpointError(f"{error.filename or folder}: {error.strerror}") from None
    except (ValueError, TypeError) as error:  # what cryptography says of files that are no PEM, or encrypted
        raise DataCorrupt(f"a file in {folder} cannot be read: {' '.join(str(error).split())}") from None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
