"""etcd 3 over its HTTP/JSON gateway: leases, and the transactions of `in_sync_set.py`. Blocking.

Every read is part of a transaction, and so linearizable: an etcd node that is cut off from the others answers nothing,
instead of something old. A request that fails in any way raises PeerUnavailable; whether etcd has done it is unknown
then, and no request is sent twice.

Keys, below PREFIX/volumes/VOLUME-UUID/
| key | value | life |
|---|---|---|
| leader | {"node": NAME, "lease": ID} | of that lease |
| members | {"epoch": N, "nodes": [NAME, …]} | until replaced |
and PREFIX/paused, whose existence alone counts, for all volumes.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from typing import Any
from uuid import UUID

from stillpoint.config import Address
from stillpoint.errors import PeerUnavailable, ProtocolError

from .in_sync_set import Key, Leader, Members, Observed, Transaction

ANSWER_SIZE_MAX = 1 << 20


class Etcd:
    """One connection at a time, to one of the endpoints. Blocking; calls are made from one thread."""

    def __init__(self, endpoints: tuple[Address, ...], *, timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        assert endpoints
        self._endpoints = list(endpoints)
        self._timeout_s = timeout_s
        self._tls = tls
        self._connection: http.client.HTTPConnection | None = None

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises PeerUnavailable; ProtocolError when what answers is no etcd 3."""
        try:
            connection = self._connection or self._connect()
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read(ANSWER_SIZE_MAX)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            # The next call begins with another one.
            self._endpoints.append(self._endpoints.pop(0))
            raise PeerUnavailable(f"etcd did not answer: {error or type(error).__name__}") from None
        if response.status != http.client.OK:
            self.close()
            raise PeerUnavailable(f"etcd refused {path}: {response.status} {data[:200].decode(errors='replace')}")
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self.close()
            raise ProtocolError(f"what answers {path} is no etcd 3")
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        failure: OSError | None = None
        for endpoint in tuple(self._endpoints):
            connection = (
                http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=self._timeout_s)
                if self._tls is None
                else http.client.HTTPSConnection(
                    endpoint.host, endpoint.port, timeout=self._timeout_s, context=self._tls
                )
            )
            try:
                connection.connect()
            except OSError as error:
                failure = error
                continue
            self._connection = connection
            return connection
        assert failure is not None
        raise failure

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- leases

    def grant(self, ttl_s: float) -> tuple[int, float]:
        """A new lease and the seconds that etcd gave it, at least those asked for."""
        answer = self.call("/v3/lease/grant", {"TTL": int(-(-ttl_s // 1))})
        return int(answer["ID"]), float(answer["TTL"])

    def keep_alive(self, lease: int) -> float:
        """The seconds it lasts from when etcd handled this; 0: it has ended."""
        result = self.call("/v3/lease/keepalive", {"ID": lease}).get("result", {})
        return float(result.get("TTL", 0))

    def revoke(self, lease: int) -> None:
        """End it, and with it the leadership of what it is bound to."""
        self.call("/v3/lease/revoke", {"ID": lease})

    # --- volumes

    def read(self, prefix: str, volume: UUID) -> Observed:
        return self._observed(self.call("/v3/kv/txn", {"success": self._looks(prefix, volume)}))

    def commit(self, prefix: str, volume: UUID, transaction: Transaction) -> Observed:
        """Done or not, as the keys say that come back: what they are right after it."""
        looks = self._looks(prefix, volume)
        body = {
            "compare": [
                _equal(prefix, volume, Key.LEADER, "CREATE", "create_revision", transaction.leader_created),
                _equal(prefix, volume, Key.MEMBERS, "MOD", "mod_revision", transaction.members_modified),
            ],
            "success": [*_changes(prefix, volume, transaction), *looks],
            "failure": looks,
        }
        if transaction.unless_paused:
            body["compare"].append(_equal(prefix, volume, Key.PAUSED, "CREATE", "create_revision", 0))
        return self._observed(self.call("/v3/kv/txn", body))

    def _looks(self, prefix: str, volume: UUID) -> list[dict[str, Any]]:
        return [{"request_range": {"key": _name(prefix, volume, key)}} for key in Key]

    def _observed(self, answer: dict[str, Any]) -> Observed:
        try:
            ranges = [part["response_range"] for part in answer["responses"] if "response_range" in part]
            leader, members, paused = (found.get("kvs", [None])[0] for found in ranges)
            return Observed(
                leader=_leader(leader),
                leader_created=int(leader["create_revision"]) if leader else 0,
                members=_members(members),
                members_modified=int(members["mod_revision"]) if members else 0,
                paused=paused is not None,
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ProtocolError(f"etcd holds what this release does not understand: {error!r}") from None

    # --- for operators

    def pause(self, prefix: str, *, paused: bool) -> None:
        """No promotion of any volume until it is resumed; who is primary stays it."""
        key = _name(prefix, None, Key.PAUSED)
        if paused:
            self.call("/v3/kv/put", {"key": key, "value": _encoded("by an operator")})
        else:
            self.call("/v3/kv/deleterange", {"key": key})


def _name(prefix: str, volume: UUID | None, key: Key) -> str:
    return _encoded(f"{prefix}/{key.value}" if key is Key.PAUSED else f"{prefix}/volumes/{volume}/{key.value}")


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _equal(prefix: str, volume: UUID, key: Key, target: str, field: str, revision: int) -> dict[str, Any]:
    return {"key": _name(prefix, volume, key), "target": target, "result": "EQUAL", field: str(revision)}


def _changes(prefix: str, volume: UUID, transaction: Transaction) -> list[dict[str, Any]]:
    puts = []
    if (leader := transaction.leader) is not None:
        value = {"node": leader.node, "lease": leader.lease}
        puts.append({"key": _name(prefix, volume, Key.LEADER), "value": _json(value), "lease": str(leader.lease)})
    if (members := transaction.members) is not None:
        value = {"epoch": members.epoch, "nodes": sorted(members.nodes)}
        puts.append({"key": _name(prefix, volume, Key.MEMBERS), "value": _json(value)})
    requests: list[dict[str, Any]] = [{"request_put": put} for put in puts]
    if transaction.resigns:
        requests.append({"request_delete_range": {"key": _name(prefix, volume, Key.LEADER)}})
    return requests


def _json(value: dict[str, Any]) -> str:
    return _encoded(json.dumps(value))


def _value(found: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(base64.b64decode(found["value"]))
    return value


def _leader(found: dict[str, Any] | None) -> Leader | None:
    if found is None:
        return None
    value = _value(found)
    return Leader(str(value["node"]), int(value["lease"]))


def _members(found: dict[str, Any] | None) -> Members | None:
    if found is None:
        return None
    value = _value(found)
    return Members(int(value["epoch"]), frozenset(str(node) for node in value["nodes"]))
