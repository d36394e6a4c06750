"""Operating errors as gRPC status codes, and back.

The status carries the error's one line and nothing else: no repr, no traceback of ours ever reaches a peer.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc

from .. import errors
from .guard import peer

logger = logging.getLogger(__name__)

# From the most special to the most general: the first match counts.
_CODES: tuple[tuple[type[errors.StillpointError], grpc.StatusCode], ...] = (
    (errors.OutOfRange, grpc.StatusCode.OUT_OF_RANGE),
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.PermissionRefused, grpc.StatusCode.PERMISSION_DENIED),
    (errors.FencedError, grpc.StatusCode.ABORTED),
    (errors.Refused, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PeerUnavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.StoreFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DataCorrupt, grpc.StatusCode.DATA_LOSS),
    (errors.SnapshotInvalid, grpc.StatusCode.DATA_LOSS),
    (errors.DeviceError, grpc.StatusCode.INTERNAL),
    (errors.StillpointError, grpc.StatusCode.INTERNAL),
)

# gRPC carries details in a header and refuses headers above 16 KiB; a name that a caller made up may be longer.
_DETAILS_MAX = 2000

_FROM_CODE: dict[grpc.StatusCode, type[errors.StillpointError]] = {
    grpc.StatusCode.OUT_OF_RANGE: errors.OutOfRange,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionRefused,
    grpc.StatusCode.ABORTED: errors.FencedError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Refused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.StoreFull,
    grpc.StatusCode.DATA_LOSS: errors.DataCorrupt,
}

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
H = TypeVar("H", bound=Callable[..., Any])


def code_of(error: errors.StillpointError) -> grpc.StatusCode:
    return next(code for kind, code in _CODES if isinstance(error, kind))


def from_rpc_error(error: grpc.RpcError, *, peer: str) -> errors.StillpointError:
    """The error that the peer reported, or PeerUnavailable naming the peer when the call did not get through."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else None) or code.name
    kind = _FROM_CODE.get(code)
    if kind is not None:
        return kind(details)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return errors.PeerUnavailable(f"the {peer} cannot be reached: {_short(details)}")
    return errors.StillpointError(f"the {peer} failed: {_short(details)}")


def _short(details: str) -> str:
    """grpc's connection errors list every address tried with its file descriptor; the last reason is enough."""
    first_line = " ".join(details.split())
    for reason in ("Connection refused", "Deadline Exceeded", "Connection reset by peer", "DNS resolution failed"):
        if reason in first_line:
            return reason.lower()
    return first_line[:200]


def answers(handler: H) -> H:
    """For the methods of a servicer: an operating error ends the call with its status code and its one line.

    Works for methods that return an answer and for those that yield a stream.
    """

    async def fail(context: Context, error: Exception) -> NoReturn:
        if isinstance(error, errors.StillpointError):
            refused = isinstance(error, errors.FencedError | errors.PermissionRefused)
            level, what = (logging.WARNING, "refused") if refused else (logging.INFO, "failed")
            logger.log(level, "call %s: %s", what, error, extra={"method": handler.__name__, **peer(context)})
            await context.abort(code_of(error), str(error)[:_DETAILS_MAX])
        logger.error("a call failed unexpectedly", exc_info=error, extra={"method": handler.__name__, **peer(context)})
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the node's log")

    if inspect.isasyncgenfunction(handler):

        @functools.wraps(handler)
        async def stream(self: object, request: object, context: Context) -> AsyncIterator[Any]:
            try:
                async for message in handler(self, request, context):
                    yield message
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the edge where every error becomes a status
                await fail(context, error)

        return stream  # type: ignore[return-value]

    @functools.wraps(handler)
    async def unary(self: object, request: object, context: Context) -> object:
        try:
            answer: Awaitable[object] = handler(self, request, context)
            return await answer
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the edge where every error becomes a status
            await fail(context, error)

    return unary  # type: ignore[return-value]
