"""Every method of every service against every role, through real servers and real certificates."""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2

from stillpoint.config import Address
from stillpoint.runtime import serve_grpc
from stillpoint.security.authorization import DATA_LINK, EXPORTS, METHODS, Exports, roles_for
from stillpoint.security.roles import Identity, Role, identity_in
from stillpoint.tls import Credentials
from stillpoint.wire import streams, v1
from stillpoint.wire.channel import open_channel
from tests.support.pki import TestPki


def every_service() -> Iterator[tuple[ServiceDescriptor, Any]]:
    """Of the generated code: each service, and what registers it with a server."""
    for module in pkgutil.iter_modules(v1.__path__):
        if not module.name.endswith("_pb2"):
            continue
        messages = importlib.import_module(f"{v1.__name__}.{module.name}")
        services = importlib.import_module(f"{v1.__name__}.{module.name}_grpc")
        for name, service in messages.DESCRIPTOR.services_by_name.items():
            yield service, getattr(services, f"add_{name}Servicer_to_server")


SERVICES = list(every_service())
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]


def methods_of(service: ServiceDescriptor) -> Iterator[str]:
    return (method.name for method in service.methods)


class Reached:
    """Any service: every method of it says that the caller got in."""

    def __getattr__(self, method: str) -> Any:
        async def handler(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} reached")

        return handler


async def outcome(channel: grpc.aio.Channel, path: str) -> str:
    """What becomes of a call with an empty message: "in" or the status code's name."""
    # A stream in both directions reaches handlers of every kind: the server alone knows what a method is.
    call: Any = channel.stream_stream(path)()
    try:
        await call.write(b"")
        await call.done_writing()
        async for _ in call:
            return "in"
    except asyncio.InvalidStateError:
        pass  # the server answered before we had finished
    except grpc.aio.AioRpcError:
        pass
    code, details = await call.code(), await call.details()
    return "in" if code is grpc.StatusCode.UNIMPLEMENTED and details.endswith("reached") else code.name


def test_every_method_of_every_service_has_a_line_in_the_table() -> None:
    missing = [
        f"/{service.full_name}/{method}"
        for service in [*(each for each, _ in SERVICES), HEALTH]
        for method in methods_of(service)
        if not roles_for(f"/{service.full_name}/{method}")
    ]
    missing = [path for path in missing if path != "/grpc.health.v1.Health/List"]  # newer releases; ours offers it not
    assert not missing, "say in stillpoint/security/authorization.py who may call these; nobody can yet"


def test_what_is_not_in_the_table_is_refused_to_everybody() -> None:
    assert roles_for("/stillpoint.wire.v1.PrimaryService/Reformat") == frozenset()
    assert roles_for("/no.such.Service/GetStatus") == frozenset()
    assert roles_for("nonsense") == frozenset()


def test_a_backup_certificate_changes_no_volume_and_opens_none() -> None:
    allowed = {
        f"{service.rpartition('.')[2]}.{method}"
        for service, methods in METHODS.items()
        for method, roles in methods.items()
        if Role.BACKUP in roles
    }
    assert allowed == {
        "StandbyService.GetStatus",
        "ReplicaService.ListReplicas",
        "StandbyService.CreateSnapshot",
        "StandbyService.ListSnapshots",
        "StandbyService.GetSnapshot",
        "StandbyService.DeleteSnapshot",
        "StandbyService.ListBookmarks",
        "StandbyService.DeleteBookmark",
        "ExportService.ReadSnapshot",
        "ExportService.ChangedExtents",
        "ExportService.DescribeSnapshot",
        "Health.Check",
        "Health.Watch",
    }
    assert Role.BACKUP not in EXPORTS[Exports.VOLUMES]
    assert frozenset({Role.DATA}) == DATA_LINK


def test_an_nbd_client_calls_no_method_at_all() -> None:
    assert not [method for methods in METHODS.values() for method, roles in methods.items() if Role.CLIENT in roles]


def test_each_method_lets_in_the_roles_of_the_table_and_refuses_all_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pki = TestPki(tmp_path)

    def add(server: grpc.aio.Server) -> None:
        for _, add_to_server in SERVICES:
            add_to_server(Reached(), streams.RawServer(server))

    async def story() -> tuple[dict[str, dict[str, str]], int]:
        server = await serve_grpc(Address("127.0.0.1", 0), add, [], pki.credentials(Role.DATA))
        address = Address("localhost", server.address.port)
        found: dict[str, dict[str, str]] = {}
        for who, credentials in holders(pki).items():
            async with open_channel(address, credentials) as channel:
                for service, _ in SERVICES:
                    for method in methods_of(service):
                        path = f"/{service.full_name}/{method}"
                        found.setdefault(path, {})[who] = await outcome(channel, path)
        await server.stop(grace_s=0)
        return found, sum(1 for line in caplog.records if line.getMessage().startswith("call refused"))

    with caplog.at_level(logging.WARNING):
        found, refusals = asyncio.run(story())
    expected = {
        path: {
            **{role.value: "in" if role in roles_for(path) else "PERMISSION_DENIED" for role in Role},
            "nobody": "PERMISSION_DENIED",
        }
        for path in found
    }
    assert found == expected
    assert refusals == sum(list(outcomes.values()).count("PERMISSION_DENIED") for outcomes in expected.values())
    refused = next(line for line in caplog.records if line.getMessage().startswith("call refused"))
    assert refused.__dict__["identity"] == "data:data1" and refused.__dict__["peer"].startswith("ipv4:127.0.0.1:")


def holders(pki: TestPki) -> dict[str, Credentials]:
    return {role.value: pki.credentials(role) for role in Role} | {"nobody": Credentials(pki.without_role())}


def test_a_role_in_a_dns_name_counts_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pki = TestPki(tmp_path)

    async def story() -> str:
        server = await serve_grpc(Address("127.0.0.1", 0), lambda _: None, [], pki.credentials(Role.DATA))
        async with open_channel(Address("127.0.0.1", server.address.port), Credentials(pki.dressed_up())) as channel:
            found = await outcome(channel, "/grpc.health.v1.Health/Check")
        await server.stop(grace_s=0)
        return found

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(story()) == "PERMISSION_DENIED"
    assert caplog.records[-1].__dict__["identity"] == "client:fox"


def test_health_answers_nodes_and_operators_alone(tmp_path: Path) -> None:
    pki = TestPki(tmp_path)

    async def story() -> dict[str, str]:
        server = await serve_grpc(Address("127.0.0.1", 0), lambda _: None, [], pki.credentials(Role.BACKUP))
        found = {}
        for who, credentials in holders(pki).items():
            async with open_channel(Address("127.0.0.1", server.address.port), credentials) as channel:
                found[who] = await outcome(channel, "/grpc.health.v1.Health/Check")
        await server.stop(grace_s=0)
        return found

    refused = "PERMISSION_DENIED"
    assert asyncio.run(story()) == {"data": "in", "backup": "in", "admin": "in", "client": refused, "nobody": refused}


def test_an_identity_is_read_from_one_uri_of_ours_and_from_nothing_else() -> None:
    assert identity_in(["https://example.org", "stillpoint:data:node-a"]) == Identity(Role.DATA, "node-a")
    for uris in (
        [],
        ["stillpoint:data"],
        ["stillpoint:root:x"],
        ["stillpoint:data:x:y"],
        ["stillpoint:data:../x"],
        ["stillpoint:data:"],
        ["STILLPOINT:data:x"],
        ["stillpoint:admin:a", "stillpoint:data:b"],
    ):
        assert identity_in(uris) is None, uris
