"""The challenge and the signatures of ``sessions`` on gRPC: metadata keys, interceptors, and the ``Auth`` service.

Open without credentials are ``Auth/Challenge`` and ``grpc.health.v1``, and nothing else: an unknown method, a missing
signature, a wrong one, one that was used before, all give the same UNAUTHENTICATED (hazard H49).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import grpc.aio

from weightwire.auth import Secret, nonce
from weightwire.errors import ProtocolError
from weightwire.wire import status
from weightwire.wire.generated import auth_pb2
from weightwire.wire.methods import AUTH, AUTH_SERVICE
from weightwire.wire.sessions import Credentials, Gatekeeper

SESSION_KEY = "weightwire-session-bin"
COUNTER_KEY = "weightwire-counter"
SIGNATURE_KEY = "weightwire-signature-bin"

CHALLENGE = AUTH["Challenge"]
_OPEN = frozenset({CHALLENGE.path, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})

CallMetadata = tuple[tuple[str, str | bytes], ...]


def challenge(channel: Any, secret: Secret, binding: bytes, timeout: float) -> Credentials:
    """Make a session over ``channel``; the server proves itself before anything else is sent to it.

    Raises:
        AuthError: it does not hold our secret.
        grpc.RpcError: it cannot be reached.
    """
    ours = nonce()
    call = channel.unary_unary(
        CHALLENGE.path,
        request_serializer=CHALLENGE.request.SerializeToString,
        response_deserializer=CHALLENGE.response.FromString,
    )
    answer = call(auth_pb2.ChallengeRequest(client_nonce=ours), timeout=timeout)
    return Credentials.check(secret, binding, ours, (answer.server_nonce, answer.proof, answer.session))


def call_metadata(credentials: Credentials, method: str) -> CallMetadata:
    """What one call carries; never reuse it."""
    token, counter, signature = credentials.next(method)
    return ((SESSION_KEY, token), (COUNTER_KEY, str(counter)), (SIGNATURE_KEY, signature))


def admitted(gatekeeper: Gatekeeper, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
    """Whether a call with this metadata may go on."""
    if method in _OPEN:
        return True
    found = dict(metadata or ())
    counter = found.get(COUNTER_KEY, "")
    if not isinstance(counter, str) or not (counter.isascii() and counter.isdigit() and len(counter) < 20):
        return False
    token, signature = found.get(SESSION_KEY, b""), found.get(SIGNATURE_KEY, b"")
    if not isinstance(token, bytes) or not isinstance(signature, bytes):
        return False
    return gatekeeper.admit(token, method, int(counter), signature)


_ServerInterceptor: Any = grpc.ServerInterceptor
_AioServerInterceptor: Any = grpc.aio.ServerInterceptor


class AuthInterceptor(_ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """For the synchronous server."""

    def __init__(self, gatekeeper: Gatekeeper) -> None:
        self._gatekeeper = gatekeeper

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """See ``grpc.ServerInterceptor``."""
        if admitted(self._gatekeeper, details.method, details.invocation_metadata):
            return continuation(details)
        return grpc.unary_unary_rpc_method_handler(_refuse)


class AioAuthInterceptor(_AioServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """For the asyncio server."""

    def __init__(self, gatekeeper: Gatekeeper) -> None:
        self._gatekeeper = gatekeeper

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """See ``grpc.aio.ServerInterceptor``."""
        if admitted(self._gatekeeper, details.method, details.invocation_metadata):
            return await continuation(details)
        return grpc.unary_unary_rpc_method_handler(_refuse_aio)


def auth_handler(gatekeeper: Gatekeeper) -> Any:
    """The ``Auth`` service of a synchronous server."""

    def answer(request: Any, context: Any) -> Any:
        try:
            return _challenge_response(gatekeeper, request)
        except ProtocolError:
            return _refuse(request, context)

    return _auth_service(answer)


def aio_auth_handler(gatekeeper: Gatekeeper) -> Any:
    """The ``Auth`` service of an asyncio server."""

    async def answer(request: Any, context: Any) -> Any:
        try:
            return _challenge_response(gatekeeper, request)
        except ProtocolError:
            return await _refuse_aio(request, context)

    return _auth_service(answer)


def _auth_service(answer: Callable[[Any, Any], Any]) -> Any:
    handler = grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=CHALLENGE.request.FromString,
        response_serializer=CHALLENGE.response.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(AUTH_SERVICE, {"Challenge": handler})


def _challenge_response(gatekeeper: Gatekeeper, request: Any) -> auth_pb2.ChallengeResponse:
    server_nonce, proof, session = gatekeeper.challenge(request.client_nonce)
    return auth_pb2.ChallengeResponse(server_nonce=server_nonce, proof=proof, session=session)


def _refuse(_request: Any, context: Any) -> Any:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, status.UNAUTHENTICATED)


async def _refuse_aio(_request: Any, context: Any) -> Any:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, status.UNAUTHENTICATED)
