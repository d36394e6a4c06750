"""The table of rights: which roles may call which method, open which exports, send on the data link.

What is not in the table is refused to everybody. A method that is added to a .proto needs a line here; until it has one
nobody can call it, and `tests/unit/security/test_authorization.py` fails.

Why backups cannot do more: the backup node pulls, so it takes and deletes snapshots and reads them. It never calls
what changes a volume, opens no volume, and cannot promote: who breaks into it does not reach the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from .roles import Role

Roles = frozenset[Role]

_NOBODY: Final[Roles] = frozenset()
_ADMIN: Final = frozenset({Role.ADMIN})
_PEER: Final = frozenset({Role.DATA})  # the other data node
_PEER_ADMIN: Final = _PEER | _ADMIN
_BACKUP_ADMIN: Final = frozenset({Role.BACKUP, Role.ADMIN})
_NODES_ADMIN: Final = frozenset({Role.DATA, Role.BACKUP, Role.ADMIN})

METHODS: Final[Mapping[str, Mapping[str, Roles]]] = {
    "stillpoint.wire.v1.PrimaryService": {
        "CreateVolume": _ADMIN,
        "GetVolume": _ADMIN,
        "ListVolumes": _ADMIN,
        "ResizeVolume": _ADMIN,
        "SetVolume": _ADMIN,
        "ResumeVolume": _ADMIN,
        "ResyncVolume": _ADMIN,
        "DeleteVolume": _ADMIN,
        "Freeze": _ADMIN,
        "Thaw": _ADMIN,
        "VerifyMirror": _ADMIN,
        "GetStatus": _ADMIN,
    },
    "stillpoint.wire.v1.StandbyService": {
        "CreateMirror": _PEER,
        "ResizeMirror": _PEER,
        "DeleteMirror": _PEER,
        "OpenLink": _PEER,
        "MirrorStream": _PEER,
        "CreateSnapshot": _BACKUP_ADMIN,
        "ListSnapshots": _BACKUP_ADMIN,
        "GetSnapshot": _BACKUP_ADMIN,
        "DeleteSnapshot": _BACKUP_ADMIN,
        "ExportSnapshot": _ADMIN,
        "ProtectSnapshot": _ADMIN,
        "ListBookmarks": _BACKUP_ADMIN,
        "DeleteBookmark": _BACKUP_ADMIN,
        "CreateStore": _ADMIN,
        "ResizeStore": _ADMIN,
        "ListStores": _ADMIN,
        "DeleteStore": _ADMIN,
        "SetSnapshotPolicy": _ADMIN,
        "ListSnapshotPolicies": _ADMIN,
        "GetStatus": _NODES_ADMIN,  # backups slow down when the standby falls behind
    },
    "stillpoint.wire.v1.ReplicaService": {
        "ListReplicas": _NODES_ADMIN,  # backups come from whoever is the standby now
        "Promote": _PEER_ADMIN,  # a switchover is one node's call to the other
        "SwitchOver": _ADMIN,
        "Rejoin": _ADMIN,
        "GiveUp": _ADMIN,
        "Outrank": _ADMIN,
        "ListDirty": _PEER,
    },
    "stillpoint.wire.v1.ExportService": {
        "ReadSnapshot": _BACKUP_ADMIN,
        "ChangedExtents": _BACKUP_ADMIN,
        "DescribeSnapshot": _BACKUP_ADMIN,
        "WriteSnapshot": _ADMIN,
        "GetStatus": _ADMIN,
    },
    "stillpoint.wire.v1.BackupService": {
        "RunBackup": _ADMIN,
        "ListBackups": _ADMIN,
        "GetBackup": _ADMIN,
        "GetUsage": _ADMIN,
        "ProtectBackup": _ADMIN,
        "PruneBackups": _ADMIN,
        "CollectGarbage": _ADMIN,
        "CheckRepository": _ADMIN,
        "ExportBackup": _ADMIN,
        "TestRestore": _ADMIN,
        "ListSchedules": _ADMIN,
        "RunSchedule": _ADMIN,
        "PauseSchedule": _ADMIN,
        "DeleteBackup": _ADMIN,
        "VerifyBackup": _ADMIN,
        "RestoreBackup": _ADMIN,
        "ReadBackup": _ADMIN,
        "GetStatus": _ADMIN,
    },
    # A node's own health check shows the node's certificate.
    "grpc.health.v1.Health": {"Check": _NODES_ADMIN, "Watch": _NODES_ADMIN},
}


class Exports(Enum):
    """What an NBD port serves."""

    VOLUMES = "volumes"
    SNAPSHOTS = "snapshots"
    BACKUPS = "backups"


EXPORTS: Final[Mapping[Exports, Roles]] = {
    Exports.VOLUMES: frozenset({Role.CLIENT, Role.ADMIN}),
    Exports.SNAPSHOTS: frozenset({Role.CLIENT, Role.ADMIN, Role.BACKUP}),
    Exports.BACKUPS: frozenset({Role.CLIENT, Role.ADMIN}),
}

DATA_LINK: Final[Roles] = _PEER


def roles_for(path: str) -> Roles:
    """Who may call the gRPC method, given as gRPC names it: `/SERVICE/METHOD`."""
    service, _, method = path.removeprefix("/").partition("/")
    return METHODS.get(service, {}).get(method, _NOBODY)
