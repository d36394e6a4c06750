"""What a certificate says about its holder: one role and one name, in a URI of its subject alternative names.

    stillpoint:ROLE:NAME        stillpoint:data:node-a        stillpoint:admin:alice

The common name says nothing. A certificate with no such URI, or with several, names nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ..config import check_name
from ..errors import InvalidRequest

_SCHEME: Final = "stillpoint"


class Role(Enum):
    """What the holder of a certificate is for. `authorization` says what each may do."""

    DATA = "data"
    """A node that holds volumes, as their primary or as their standby: promotion swaps the two, never certificates."""
    BACKUP = "backup"
    ADMIN = "admin"
    """An operator's standbyctl."""
    CLIENT = "client"
    """A user of volumes over NBD."""

    @property
    def serves(self) -> bool:
        """Whether holders of the role accept connections."""
        return self in (Role.DATA, Role.BACKUP)


@dataclass(frozen=True, slots=True)
class Identity:
    role: Role
    name: str

    @property
    def uri(self) -> str:
        return f"{_SCHEME}:{self.role.value}:{self.name}"

    def __str__(self) -> str:
        return f"{self.role.value}:{self.name}"


def identity_in(uris: Iterable[str]) -> Identity | None:
    """The one identity among the URIs of a certificate; None when there is none, several, or one of an unknown role."""
    ours = [uri for uri in uris if uri.partition(":")[0] == _SCHEME]
    if len(ours) != 1:
        return None
    parts = ours[0].split(":")
    if len(parts) != 3:
        return None
    try:
        return Identity(Role(parts[1]), check_name(parts[2], "certificate"))
    except (ValueError, InvalidRequest):
        return None
