"""Authority and certificates, through standbyctl and as a library."""

from __future__ import annotations

import datetime
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from stillpoint.cli.standbyctl import main
from stillpoint.errors import AlreadyExists, ConfigError, InvalidRequest, NotFound
from stillpoint.security.pki import (
    CLIENT_USAGE,
    LIFETIME,
    SERVER_USAGE,
    Authority,
    alternative_names,
    hosts_of,
    identity_of,
)
from stillpoint.security.roles import Identity, Role
from stillpoint.tls import Credentials
from tests.support.pki import TestPki

NODE = Identity(Role.DATA, "node-a")


def load(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def standbyctl(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


def test_an_authority_and_a_certificate_are_made_by_two_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pki"
    code, out, _ = standbyctl(capsys, "--json", "pki", "init", "--dir", folder)
    assert code == 0 and json.loads(out)["key"] == str(folder / "ca-key.pem")
    code, out, _ = standbyctl(
        capsys,
        "--json",
        "pki",
        "issue",
        "data",
        "node-a",
        "--dir",
        folder,
        "--host",
        "a.example.org",
        "--host",
        "192.0.2.7",
    )
    made = json.loads(out)
    assert code == 0
    assert (made["role"], made["name"], made["hosts"]) == ("data", "node-a", ["a.example.org", "192.0.2.7"])
    certificate = load(folder / "node-a")
    assert identity_of(certificate) == NODE
    assert hosts_of(certificate) == ["a.example.org", "192.0.2.7"]
    assert certificate.not_valid_after_utc.isoformat() == made["not_after"]
    certificate.verify_directly_issued_by(Authority.open(folder).certificate)
    assert Credentials(folder / "node-a").identity == NODE


def test_keys_are_for_their_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        pki = TestPki(tmp_path)
        folder = pki.issue(Role.DATA)
    finally:
        os.umask(before)
    for key in (tmp_path / "ca" / "ca-key.pem", folder / "key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key


def test_nodes_are_servers_and_clients_and_the_others_clients_alone(tmp_path: Path) -> None:
    pki = TestPki(tmp_path)
    for role in Role:
        certificate = load(pki.issue(role))
        usage = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        assert usage == ({SERVER_USAGE, CLIENT_USAGE} if role.serves else {CLIENT_USAGE})
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pki = TestPki(tmp_path)
    folder = pki.issue(Role.ADMIN, "alice")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.pem")}
    code, _, error = standbyctl(capsys, "pki", "init", "--dir", tmp_path / "ca")
    assert code == 1 and "is there already" in error and len(error.splitlines()) == 1
    code, _, error = standbyctl(capsys, "pki", "issue", "admin", "alice", "--dir", tmp_path / "ca", "--out", folder)
    assert code == 1 and "--renew" in error and len(error.splitlines()) == 1
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*.pem")}
    with pytest.raises(AlreadyExists):
        pki.authority.issue(Identity(Role.ADMIN, "alice"), folder)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["issue", "data", "node-a", "--dir", "nowhere", "--host", "a"], 1, "standbyctl pki init"),
        (["issue", "data", "node-a", "--dir", "ca"], 1, "--host"),
        (["issue", "data", "../x", "--dir", "ca", "--host", "a"], 2, "is no certificate name"),
        (["issue", "data", "node-a", "--dir", "ca", "--host", "a:7410"], 1, "without a port"),
        (["issue", "root", "node-a", "--dir", "ca"], 2, "'data', 'backup', 'admin', 'client'"),
        (["issue", "admin", "a", "--dir", "ca", "--lifetime", "never"], 2, "90d, 12h, 30m"),
        (["issue", "admin", "a", "--dir", "ca", "--lifetime", "4000d"], 1, "outlive its authority"),
        (["issue", "admin", "a", "--dir", "ca", "--renew"], 1, "no certificate"),
        (["issue", "data", "a", "--dir", "ca", "--renew", "--host", "b"], 2, "leave --host out"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_makes_nothing(
    arguments: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    TestPki(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found, out, error = standbyctl(capsys, "pki", *arguments)
    assert (found, out) == (code, "") and says in error and len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_renewal_keeps_who_and_where_and_the_key_and_lasts_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pki = TestPki(tmp_path)
    folder = tmp_path / "node-a"
    hour = datetime.timedelta(hours=1)
    pki.authority.issue(NODE, folder, hosts=["a.example.org", "2001:db8::1"], lifetime=hour)
    old, key = load(folder), (folder / "key.pem").read_bytes()
    code, _, error = standbyctl(
        capsys, "pki", "issue", "data", "node-a", "--dir", tmp_path / "ca", "--out", folder, "--renew"
    )
    assert code == 0, error
    new = load(folder)
    assert (identity_of(new), hosts_of(new)) == (NODE, ["a.example.org", "2001:db8::1"])
    assert (folder / "key.pem").read_bytes() == key
    assert new.serial_number != old.serial_number
    assert new.not_valid_after_utc - old.not_valid_after_utc > LIFETIME - 2 * hour


def test_only_its_own_authority_renews_a_certificate_and_only_for_its_holder(tmp_path: Path) -> None:
    pki = TestPki(tmp_path)
    folder = pki.issue(Role.DATA, "node-a")
    before = (folder / "cert.pem").read_bytes()
    other = Authority.create(tmp_path / "other")
    with pytest.raises(InvalidRequest, match="another authority"):
        other.renew(folder, NODE)
    with pytest.raises(InvalidRequest, match="is of data:node-a, not of admin:node-a"):
        pki.authority.renew(folder, Identity(Role.ADMIN, "node-a"))
    assert (folder / "cert.pem").read_bytes() == before


def test_an_authority_without_its_own_key_is_not_opened(tmp_path: Path) -> None:
    pki = TestPki(tmp_path)
    other = Authority.create(tmp_path / "other")
    with pytest.raises(NotFound, match="no certificate authority"):
        Authority.open(tmp_path)
    (pki.authority.folder / "ca-key.pem").write_bytes((other.folder / "ca-key.pem").read_bytes())
    with pytest.raises(Exception, match=r"is not the key of"):
        Authority.open(pki.authority.folder)
    (pki.authority.folder / "ca-key.pem").write_text("rubbish")
    with pytest.raises(Exception, match="cannot be read"):
        Authority.open(pki.authority.folder)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: (folder / "key.pem").unlink(), "standbyctl pki issue"),
        (lambda folder: (folder / "cert.pem").write_text("rubbish"), "cannot be used"),
        (lambda folder: (folder / "ca-cert.pem").write_text(""), "cannot be used"),
        (lambda folder: (folder / "ca-cert.pem").write_bytes(b"\xff\xfe"), "cannot be used"),
        (lambda folder: _other_key(folder), "cannot be used: key values mismatch"),
        (lambda folder: _locked_key(folder), "cannot be used"),
    ],
)
def test_a_node_says_in_one_line_what_is_wrong_with_its_certificates(
    break_it: object, says: str, tmp_path: Path
) -> None:
    folder = TestPki(tmp_path).issue(Role.DATA)
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=says) as caught:
        Credentials(folder)
    assert len(str(caught.value).splitlines()) == 1


def _other_key(folder: Path) -> None:
    other = TestPki(folder / "elsewhere").issue(Role.DATA)
    (folder / "key.pem").write_bytes((other / "key.pem").read_bytes())


def _locked_key(folder: Path) -> None:
    """OpenSSL would ask for its password on the terminal, if it were let."""
    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )


def test_a_certificate_that_expired_or_names_no_role_starts_no_node(tmp_path: Path) -> None:
    pki = TestPki(tmp_path)
    with pytest.raises(ConfigError, match=r"expired at .* renew it"):
        Credentials(pki.expired(Role.DATA)).check_valid()
    with pytest.raises(ConfigError, match="names no role"):
        Credentials(pki.without_role()).check_valid()
    Credentials(pki.issue(Role.DATA)).check_valid()


def test_host_names_are_dns_names_and_addresses_and_nothing_else() -> None:
    names = alternative_names(NODE, ["bücher.example", "::1", "10.0.0.1", "localhost"])
    assert [name.value for name in names][1] == "xn--bcher-kva.example"
    for host in ("", "a b", "a/b", "host:80"):
        with pytest.raises(InvalidRequest):
            alternative_names(NODE, [host])
