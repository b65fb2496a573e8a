"""gRPC in front of a ``MetadataService``: the asyncio adapter and the server that carries it."""

from __future__ import annotations

import contextlib
import ipaddress
import uuid
from collections.abc import AsyncIterator
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from weightwire.auth import Secret
from weightwire.errors import WeightwireError
from weightwire.wire import auth_grpc, listen
from weightwire.wire.codec import decode, encode
from weightwire.wire.messages import (
    FindReplicas,
    FindShard,
    KeepBeat,
    PublicationRecord,
    Withdrawal,
)
from weightwire.wire.methods import METADATA, METADATA_SERVICE, Method
from weightwire.wire.reports import PeerFailure
from weightwire.wire.requests import DecideRequest, Empty, SourcesRequest
from weightwire.wire.services import MetadataService
from weightwire.wire.sessions import Gatekeeper
from weightwire.wire.status import Callee, to_status

Value = TypeVar("Value")


class MetadataServicer:
    """Decodes, calls the service, encodes; one coroutine per RPC, named as in the proto file."""

    def __init__(self, service: MetadataService) -> None:
        self._service = service

    async def Publish(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``MetadataService.publish``."""
        async with _translated(context):
            return _answer("Publish", await self._service.publish(decode(PublicationRecord, request)))

    async def Keep(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """See ``MetadataService.keep``."""
        stream = uuid.uuid4().hex
        try:
            async with _translated(context):
                async for request in requests:
                    yield _answer("Keep", await self._service.keep(stream, decode(KeepBeat, request)))
        finally:
            await self._service.keep_ended(stream)

    async def Withdraw(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``MetadataService.withdraw``."""
        async with _translated(context):
            await self._service.withdraw(decode(Withdrawal, request))
            return _answer("Withdraw", Empty())

    async def FindReplicas(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``MetadataService.find_replicas``."""
        async with _translated(context):
            return _answer("FindReplicas", await self._service.find_replicas(decode(FindReplicas, request)))

    async def FindShard(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``MetadataService.find_shard``."""
        async with _translated(context):
            return _answer("FindShard", await self._service.find_shard(decode(FindShard, request)))

    async def Report(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``MetadataService.report``."""
        async with _translated(context):
            observed = observed_host(context.peer())
            return _answer("Report", await self._service.report(decode(PeerFailure, request), observed))

    async def Sources(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """See ``MetadataService.sources``."""
        async with _translated(context):
            for view in await self._service.sources(decode(SourcesRequest, request).model_id):
                yield _answer("Sources", view)

    async def Decide(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``MetadataService.decide``."""
        async with _translated(context):
            asked = decode(DecideRequest, request)
            return _answer("Decide", await self._service.decide(asked.key, asked.value, asked.wait_s))


class MetadataListener:
    """A gRPC server around a service: bound in the constructor's event loop, credentials demanded, health open.

    Args:
        service: the domain.
        secret: the shared secret.
        host: address or name to listen on.
        port: 0 to have one chosen.
        keepalive_s: a client that answers no ping for twice this long counts as gone.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, service: MetadataService, secret: Secret, host: str, port: int, keepalive_s: float) -> None:
        self.gatekeeper = Gatekeeper(secret, Callee.METADATA.value.encode())
        interceptors = [auth_grpc.AioAuthInterceptor(self.gatekeeper)]
        self._server = grpc.aio.server(interceptors=interceptors, options=listen.options(keepalive_s))
        handlers = _handlers(MetadataServicer(service))
        self._server.add_generic_rpc_handlers((handlers, auth_grpc.aio_auth_handler(self.gatekeeper)))
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = listen.bind(self._server.add_insecure_port, host, port)

    async def start(self) -> None:
        """Begin to answer; health says SERVING."""
        await self._server.start()
        for name in ("", METADATA_SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float) -> None:
        """Health says NOT_SERVING, new calls are refused, running ones get ``grace`` seconds; idempotent."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


def observed_host(peer: str) -> str:
    """The address in gRPC's ``ipv4:1.2.3.4:5`` or ``ipv6:[::1]:5``; "" for loopback and what is no address."""
    text = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    mapped = getattr(address, "ipv4_mapped", None) or address
    return "" if mapped.is_loopback else str(mapped)


def _handlers(servicer: MetadataServicer) -> Any:
    handlers = {name: _handler(method, getattr(servicer, name)) for name, method in METADATA.items()}
    return grpc.method_handlers_generic_handler(METADATA_SERVICE, handlers)


def _handler(method: Method, behaviour: Any) -> Any:
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[method.client_streams, method.server_streams]
    return make(
        behaviour,
        request_deserializer=method.request.FromString,
        response_serializer=method.response.SerializeToString,
    )


def _answer(name: str, value: object) -> Any:
    return encode(value, METADATA[name].response)


@contextlib.asynccontextmanager
async def _translated(context: Any) -> AsyncIterator[None]:
    try:
        yield
    except WeightwireError as error:
        await context.abort(*to_status(error))
