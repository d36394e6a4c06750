"""standbyctl pki: an authority, and certificates for nodes, operators and NBD clients."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from ..config import check_name
from ..errors import InvalidRequest
from ..security.roles import Identity, Role
from .command import Group, Invocation, pass_invocation

_LIFETIME = re.compile(r"^\s*(\d+)\s*(d|h|m)\s*$")
_LIFETIME_UNITS = {"d": "days", "h": "hours", "m": "minutes"}
_LIFETIME_MAX = timedelta(days=36500)


def lifetime(text: str | timedelta) -> timedelta:
    """A value type of options: "90d", "12h", "30m"."""
    if isinstance(text, timedelta):
        return text
    match = _LIFETIME.match(text)
    value = timedelta(**{_LIFETIME_UNITS[match[2]]: min(int(match[1]), 10**8)}) if match else timedelta(0)
    if not timedelta(0) < value <= _LIFETIME_MAX:
        raise click.BadParameter(f"{text!r} is not a lifetime; write days, hours or minutes, such as 90d, 12h, 30m")
    return value


dir_option = click.option(
    "--dir",
    "directory",
    default="pki",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The authority's folder.",
)


@click.group(cls=Group)
def pki() -> None:
    """Certificates for nodes, operators and NBD clients.

    \b
    Example: standbyctl pki init
             standbyctl pki issue data node-a --host node-a.example.org --host 192.0.2.1
             standbyctl pki issue data node-b --host node-b.example.org
             standbyctl pki issue backup vault --host vault.example.org
             standbyctl pki issue admin alice
             standbyctl pki issue client vm-host-1
    Copy pki/NAME to its holder and name it there: `tls: {directory: …}` in a node's configuration and in the cluster
    file, `?tls-certificates=…` in an nbds:// URI. Keep ca-key.pem where no node is.
    """


@pki.command()
@dir_option
@click.option("--name", default="Stillpoint CA", show_default=True, help="The authority's name in certificates.")
@click.option("--lifetime", "duration", type=lifetime, default="3650d", show_default=True, metavar="90d|12h|30m")
@pass_invocation
def init(invocation: Invocation, directory: Path, name: str, duration: timedelta) -> None:
    """Make an authority: a key and the certificate that all nodes trust.

    \b
    Example: standbyctl pki init --dir /root/stillpoint-pki
    """
    from ..security.pki import CA_CERTIFICATE, CA_KEY, Authority

    authority = Authority.create(directory, name=name, lifetime=duration)
    end = authority.certificate.not_valid_after_utc
    if invocation.output.as_json:
        invocation.output.document(
            {
                "folder": str(directory),
                "certificate": str(directory / CA_CERTIFICATE),
                "key": str(directory / CA_KEY),
                "not_after": end.isoformat(),
            }
        )
        return
    invocation.output.line(
        f"authority made in {directory}, valid until {end:%F}; keep {directory / CA_KEY} to yourself"
    )


@pki.command()
@click.argument("role", type=click.Choice([role.value for role in Role]))
@click.argument("name")
@dir_option
@click.option(
    "--host", "hosts", multiple=True, metavar="HOST", help="DNS name or IP address the node is reached by; repeatable."
)
@click.option("--lifetime", "duration", type=lifetime, default="90d", show_default=True, metavar="90d|12h|30m")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Put it here. [default: NAME in the authority's]"
)
@click.option("--renew", is_flag=True, help="Replace the certificate there by one that lasts longer; the key stays.")
@pass_invocation
def issue(
    invocation: Invocation,
    role: str,
    name: str,
    directory: Path,
    hosts: tuple[str, ...],
    duration: timedelta,
    out: Path | None,
    renew: bool,
) -> None:
    """Make a key and a certificate for NAME, in a new folder.

    ROLE is what the holder may do: data (a node that holds volumes, whichever of the two it is today), backup (the
    backup node), admin (standbyctl), client (opens volumes, snapshots and backups over NBD).

    A node reads a renewed certificate by itself; nothing has to be restarted.

    \b
    Example: standbyctl pki issue data node-a --host node-a.example.org
             standbyctl pki issue data node-a --renew
    """
    from ..security.pki import Authority

    identity = identity_of(role, name)
    folder = out or directory / name
    authority = Authority.open(directory)
    if renew:
        if hosts:
            raise click.UsageError("--renew keeps the hosts of the certificate; leave --host out")
        issued = authority.renew(folder, identity, lifetime=duration)
    else:
        issued = authority.issue(identity, folder, hosts=hosts, lifetime=duration)
    if invocation.output.as_json:
        document: dict[str, Any] = {
            "folder": str(issued.folder),
            "role": role,
            "name": name,
            "hosts": list(issued.hosts),
            "not_after": issued.not_after.isoformat(),
        }
        invocation.output.document(document)
        return
    invocation.output.line(
        f"{issued.identity}: certificate {'renewed' if renew else 'made'} in {issued.folder}, "
        f"valid until {issued.not_after:%F %H:%M} UTC"
    )


def identity_of(role: str, name: str) -> Identity:
    """Raises click.BadParameter for a name that is none."""
    try:
        return Identity(Role(role), check_name(name, "certificate"))
    except InvalidRequest as error:
        raise click.BadParameter(str(error), param_hint="NAME") from None
