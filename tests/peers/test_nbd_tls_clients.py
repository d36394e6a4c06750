"""Clients that others wrote, against our NBD server over TLS, with the folders that `standbyctl pki issue` makes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillpoint.config import NbdTls
from stillpoint.devices import MemoryDevice
from stillpoint.nbd.access import Access
from stillpoint.nbd.export import DeviceExport
from stillpoint.security.authorization import EXPORTS, Exports
from stillpoint.security.roles import Role
from tests.support.nbd import ServerThread
from tests.support.pki import TestPki
from tests.support.requirements import requires_tools

SIZE = 32 << 20


@pytest.fixture
def pki(tmp_path: Path) -> TestPki:
    return TestPki(tmp_path / "pki")


@pytest.fixture
def server(pki: TestPki) -> Iterator[ServerThread]:
    with ServerThread(access=Access(pki.credentials(Role.DATA), NbdTls.REQUIRE, EXPORTS[Exports.VOLUMES])) as server:
        server.exports["vol1"] = DeviceExport("vol1", MemoryDevice(SIZE), server.executor)
        yield server


def uri(server: ServerThread, certificates: Path) -> str:
    return f"nbds://localhost:{server.port}/vol1?tls-certificates={certificates}"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)


@requires_tools("nbdinfo")
def test_nbdinfo_sees_the_export_over_tls(server: ServerThread, pki: TestPki) -> None:
    done = run("nbdinfo", "--json", uri(server, pki.issue(Role.CLIENT)))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["TLS"] is True and told["exports"][0]["export-size"] == SIZE


@requires_tools("nbdcopy")
def test_nbdcopy_writes_and_reads_back_over_many_tls_connections(
    server: ServerThread, pki: TestPki, tmp_path: Path
) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    image.write_bytes(os.urandom(SIZE))
    place = uri(server, pki.issue(Role.CLIENT))
    assert (done := run("nbdcopy", "--flush", image, place)).returncode == 0, done.stderr
    assert (done := run("nbdcopy", place, back)).returncode == 0, done.stderr
    assert run("cmp", image, back).returncode == 0


@requires_tools("qemu-img", "qemu-io")
def test_qemu_works_with_tls_credentials_of_ours(server: ServerThread, pki: TestPki, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(SIZE))
    credentials = f"tls-creds-x509,id=tls0,dir={pki.issue(Role.CLIENT)},endpoint=client,verify-peer=on"
    export = f"driver=nbd,host=localhost,port={server.port},export=vol1,tls-creds=tls0"
    convert = ["qemu-img", "convert", "--object", credentials, "-n", "--target-image-opts", "-f", "raw"]
    assert (done := run(*convert, image, f"driver=raw,file.driver=nbd,{_nested(export)}")).returncode == 0, done.stderr
    compare = ["qemu-img", "compare", "--object", credentials, "--image-opts"]
    done = run(*compare, f"driver=raw,file.driver=nbd,{_nested(export)}", f"driver=file,filename={image}")
    assert done.returncode == 0, done.stdout + done.stderr


def _nested(options: str) -> str:
    return ",".join(f"file.{option}" for option in options.split(",") if not option.startswith("driver="))


@requires_tools("nbdinfo")
@pytest.mark.parametrize("kind", ["plaintext", "wrong role", "other authority", "expired"])
def test_nbdinfo_without_the_right_certificate_learns_nothing(server: ServerThread, pki: TestPki, kind: str) -> None:
    place = {
        "plaintext": lambda: f"nbd://localhost:{server.port}/vol1",
        "wrong role": lambda: uri(server, pki.issue(Role.BACKUP)),
        "other authority": lambda: uri(server, pki.of_other_authority(Role.CLIENT)),
        "expired": lambda: uri(server, pki.expired(Role.CLIENT)),
    }[kind]()
    done = run("nbdinfo", place)
    assert done.returncode != 0 and "export-size" not in done.stdout
