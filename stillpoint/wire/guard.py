"""The door of every gRPC server with certificates: no handler runs before the caller's role is in the table of rights.

TLS has by then refused who shows no certificate of our authority, or one that expired or is not for clients. gRPC does
that outside Python: its own log line says why, and cannot say who.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from ..security.authorization import roles_for
from ..security.roles import Identity, identity_in

logger = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def caller(context: _Context) -> Identity | None:
    """Who calls, by its certificate; None in plaintext, and for a certificate without a role."""
    # Not `x509_subject_alternative_name`: there a DNS name could pass for a URI.
    return identity_in(uri.decode("ascii", "replace") for uri in context.auth_context().get("peer_uri", ()))


def peer(context: _Context) -> dict[str, str]:
    """The caller for a log line's `extra`."""
    return {"peer": context.peer(), "identity": str(caller(context) or "unknown")}


class Guard(grpc.aio.ServerInterceptor):
    """Refuses with PERMISSION_DENIED what the table does not allow, and says so in the log."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method: answered UNIMPLEMENTED, whoever asks
            return None
        kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
        return handler._replace(**{kind: _guarded(handler_call_details.method, getattr(handler, kind))})


def _guarded(method: str, behaviour: Callable[[Any, _Context], Any]) -> Callable[[Any, _Context], Any]:
    if inspect.isasyncgenfunction(behaviour):

        async def stream(request: Any, context: _Context) -> AsyncIterator[Any]:
            await _admit(method, context)
            async with contextlib.aclosing(behaviour(request, context)) as messages:
                async for message in messages:
                    yield message

        return stream

    async def call(request: Any, context: _Context) -> Any:
        await _admit(method, context)
        return await behaviour(request, context)

    return call


async def _admit(method: str, context: _Context) -> None:
    identity = caller(context)
    if identity is not None and identity.role in roles_for(method):
        return
    logger.warning("call refused: the caller's role does not allow it", extra={"method": method, **peer(context)})
    who = f"a certificate of role {identity.role.value!r}" if identity is not None else "a certificate without a role"
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{who} may not call {method.rpartition('/')[2]}")
