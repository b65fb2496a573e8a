"""gRPC in front of a ``PeerService``: each rank's own endpoint, synchronous, with a bounded pool of threads."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from weightwire.auth import Secret
from weightwire.errors import PeerLost, SourceBusy, WeightwireError
from weightwire.wire import auth_grpc, listen
from weightwire.wire.codec import decode, encode
from weightwire.wire.manifest_codec import grant_parts, manifest_parts
from weightwire.wire.messages import OpenRead
from weightwire.wire.methods import PEER, PEER_SERVICE, Method
from weightwire.wire.requests import (
    CloseReadRequest,
    Empty,
    ProgressRequest,
    SelfCheckRequest,
    SelfCheckResponse,
    ShardRequest,
)
from weightwire.wire.services import PeerService
from weightwire.wire.sessions import Gatekeeper
from weightwire.wire.status import Callee, to_status

logger = logging.getLogger(__name__)

WORKERS = 64
"""Threads, made as they are needed. At most half of them carry ``Progress`` streams, so that others get through."""
KEEPALIVE_S = 5.0


class PeerServicer:
    """Decodes, checks the incarnation, calls the service, encodes; one method per RPC, named as in the proto file."""

    def __init__(self, service: PeerService, max_streams: int) -> None:
        self._service = service
        self._streams = threading.BoundedSemaphore(max_streams)

    def Status(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``PeerService.status``."""
        with _translated(context):
            asked = decode(ShardRequest, request)
            self._check(asked.incarnation)
            return _answer("Status", self._service.status(asked.shard_key))

    def GetManifest(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """See ``PeerService.manifest``."""
        with _translated(context):
            asked = decode(ShardRequest, request)
            self._check(asked.incarnation)
            header, manifest = self._service.manifest(asked.shard_key)
            yield from manifest_parts(header, manifest)

    def OpenRead(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """See ``PeerService.open_read``."""
        with _translated(context):
            asked = decode(OpenRead, request)
            self._check(asked.incarnation)
            yield from grant_parts(self._service.open_read(asked))

    def Progress(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """See ``PeerService.progress``."""
        with _translated(context), self._stream():
            asked = decode(ProgressRequest, request)
            self._check(asked.incarnation)
            updates = self._service.progress(asked.lease, asked.since)
            with contextlib.closing(_as_generator(updates)) as open_updates:
                for update in open_updates:
                    if not context.is_active():
                        return
                    yield _answer("Progress", update)

    def CloseRead(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``PeerService.close_read``."""
        with _translated(context):
            asked = decode(CloseReadRequest, request)
            self._check(asked.incarnation)
            self._service.close_read(asked.lease)
            return _answer("CloseRead", Empty())

    def SelfCheck(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See ``PeerService.self_check``."""
        with _translated(context):
            asked = decode(SelfCheckRequest, request)
            self._check(asked.incarnation)
            ok = self._service.self_check(asked.shard_key, asked.leaf)
            return _answer("SelfCheck", SelfCheckResponse(ok))

    def _check(self, incarnation: str) -> None:
        if incarnation != self._service.incarnation:
            raise PeerLost(f"the process {incarnation} is gone; another one has its address", "ask for sources again")

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        if not self._streams.acquire(blocking=False):
            raise SourceBusy("the source serves as many readers as it has threads for", "try another source")
        try:
            yield
        finally:
            self._streams.release()


class PeerServer:
    """One process's peer endpoint; bound and answering once constructed.

    Args:
        service: the domain.
        secret: the shared secret.
        host: address or name to listen on.
        port: 0 to have one chosen.
        workers: threads at most; also how many calls run at a time.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(
        self, service: PeerService, secret: Secret, host: str = "127.0.0.1", port: int = 0, *, workers: int = WORKERS
    ) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="weightwire-peer")
        gatekeeper = Gatekeeper(secret, Callee.PEER.value.encode())
        self._server = grpc.server(
            self._pool,
            interceptors=[auth_grpc.AuthInterceptor(gatekeeper)],
            options=listen.options(KEEPALIVE_S),
            maximum_concurrent_rpcs=workers,
        )
        handlers = _handlers(PeerServicer(service, max(1, workers // 2)))
        self._server.add_generic_rpc_handlers((handlers, auth_grpc.auth_handler(gatekeeper)))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = listen.bind(self._server.add_insecure_port, host, port)
        self._server.start()
        for name in ("", PEER_SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        logger.info("peer endpoint listens on %s", listen.join(host, self.port))

    def stop(self, grace: float) -> None:
        """Refuse new calls, give running ones ``grace`` seconds, cut the rest; returns when done. Idempotent."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait(grace + 5)
        self._pool.shutdown(wait=False, cancel_futures=True)


def _as_generator(updates: Iterator[Any]) -> Any:
    """A generator around any iterator, so that closing it closes what it stands on."""
    try:
        yield from updates
    finally:
        close = getattr(updates, "close", None)
        if close is not None:
            close()


def _handlers(servicer: PeerServicer) -> Any:
    handlers = {name: _handler(method, getattr(servicer, name)) for name, method in PEER.items()}
    return grpc.method_handlers_generic_handler(PEER_SERVICE, handlers)


def _handler(method: Method, behaviour: Any) -> Any:
    make = grpc.unary_stream_rpc_method_handler if method.server_streams else grpc.unary_unary_rpc_method_handler
    return make(
        behaviour,
        request_deserializer=method.request.FromString,
        response_serializer=method.response.SerializeToString,
    )


def _answer(name: str, value: object) -> Any:
    return encode(value, PEER[name].response)


@contextlib.contextmanager
def _translated(context: Any) -> Iterator[None]:
    try:
        yield
    except WeightwireError as error:
        code, details, trailing = to_status(error)
        context.set_trailing_metadata(trailing)
        context.abort(code, details)
