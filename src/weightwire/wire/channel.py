"""The synchronous client: one authenticated channel, every call bounded, every failure one of our errors."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grpc

from weightwire.auth import Secret
from weightwire.wire import auth_grpc, bounds
from weightwire.wire.methods import Method
from weightwire.wire.sessions import Credentials
from weightwire.wire.status import Callee, from_call, stalled

logger = logging.getLogger(__name__)

KEEPALIVE_S = 5.0
"""A dead network is noticed within about twice this."""

OPTIONS = (
    ("grpc.max_send_message_length", bounds.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", bounds.MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),  # peers are spoken to directly, whatever the environment says
    ("grpc.use_local_subchannel_pool", 1),  # a channel's back-off is its own
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),  # despite its name: what one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)


class Channel:
    """A connection to one endpoint. Thread safe; connects on first use; makes its session by itself.

    Args:
        target: ``host:port``.
        secret: the shared secret.
        callee: who is there, which decides what the errors are called and what the proofs are good for.
    """

    def __init__(self, target: str, secret: Secret, callee: Callee) -> None:
        self.target = target
        self._secret = secret
        self._callee = callee
        self._channel = grpc.insecure_channel(target, options=OPTIONS)
        self._credentials: Credentials | None = None
        self._lock = threading.Lock()

    def unary(self, method: Method, request: Any, timeout: float) -> Any:
        """Call a method with one request and one response.

        Args:
            method: from the table in ``methods``.
            request: protobuf message.
            timeout: seconds for all of it, a new session included.

        Raises:
            WeightwireError: as ``status`` says.
        """
        until = time.monotonic() + timeout

        def invoke(metadata: auth_grpc.CallMetadata) -> Any:
            return self._stub(method)(request, timeout=_left(until), metadata=metadata)

        return self._authenticated(method, invoke, until)

    def stream(
        self, method: Method, request: Any, timeout: float, stall_s: float | None = None
    ) -> Generator[Any, None, None]:
        """Call a method that answers with a stream; the call ends when the iterator is closed.

        Args:
            method: from the table in ``methods``.
            request: protobuf message.
            timeout: seconds for the whole stream.
            stall_s: seconds for each message; None for no bound but ``timeout``.
        """
        until = time.monotonic() + timeout

        def invoke(metadata: auth_grpc.CallMetadata) -> tuple[_Stream, Any]:
            call = _Stream(self._stub(method)(request, timeout=_left(until), metadata=metadata), stall_s)
            return call, next(call, None)  # the first message shows whether the session was taken

        call, first = self._authenticated(method, invoke, until)
        return self._messages(call, first)

    def duplex(self, method: Method, requests: Iterator[Any], timeout: float) -> Any:
        """Open a stream both ways, without a total bound; ``cancel()`` ends it.

        Args:
            method: from the table in ``methods``.
            requests: what is sent, taken from by a thread of gRPC's.
            timeout: seconds for making a session, not for the stream.
        """
        credentials = self._session(time.monotonic() + timeout)
        return self._stub(method)(requests, metadata=auth_grpc.call_metadata(credentials, method.path))

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn gRPC's errors into ours, and forget a session that was refused."""
        try:
            yield
        except grpc.RpcError as error:
            if _refused(error):
                self._credentials = None
            raise from_call(error, self._callee, self.target) from error
        except _StalledError as error:
            raise stalled(self._callee, self.target) from error

    def close(self) -> None:
        """End all calls; idempotent."""
        self._channel.close()

    def _messages(self, call: _Stream, first: Any) -> Generator[Any, None, None]:
        try:
            with self.translated():
                if first is not None:
                    yield first
                    yield from call
        finally:
            call.cancel()

    def _authenticated(self, method: Method, invoke: Callable[[auth_grpc.CallMetadata], Any], until: float) -> Any:
        with self.translated():
            reused = self._credentials is not None
            credentials = self._session(until)
            try:
                return invoke(auth_grpc.call_metadata(credentials, method.path))
            except grpc.RpcError as error:
                if not (reused and _refused(error)):
                    raise
            logger.debug("session with %s was refused, making another", self.target)
            with self._lock:
                if self._credentials is credentials:
                    self._credentials = None
            return invoke(auth_grpc.call_metadata(self._session(until), method.path))

    def _session(self, until: float) -> Credentials:
        with self.translated(), self._lock:
            if self._credentials is None:
                self._credentials = auth_grpc.challenge(
                    self._channel, self._secret, self._callee.value.encode(), _left(until)
                )
            return self._credentials

    def _stub(self, method: Method) -> Any:
        kind = f"{_word(method.client_streams)}_{_word(method.server_streams)}"
        return getattr(self._channel, kind)(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )


class _StalledError(Exception):
    """A stream brought nothing within its bound."""


class _Stream:
    """The answers of one call, each awaited for a bounded time where a bound is given.

    One thread watches over all of them: one a message cost as much as all else that is done for it.
    """

    def __init__(self, call: Any, stall_s: float | None) -> None:
        self._call = call
        self._stall_s = stall_s
        self._due = math.inf
        self._stalled = False
        if stall_s is not None:
            over = threading.Event()
            if call.add_callback(over.set):  # false: it has ended already
                threading.Thread(target=self._watch, args=(over, stall_s), name="weightwire-stall", daemon=True).start()

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        if self._stall_s is None:
            return next(self._call)
        self._due = time.monotonic() + self._stall_s
        try:
            return next(self._call)
        except grpc.RpcError as error:
            if self._stalled:
                raise _StalledError from error
            raise
        finally:
            self._due = math.inf

    def cancel(self) -> None:
        """End the call."""
        self._call.cancel()

    def _watch(self, over: threading.Event, stall_s: float) -> None:
        """Until the call has ended, which its own timeout bounds."""
        left = stall_s  # whatever is awaited meanwhile has as long, from a later moment
        while not over.wait(left):
            left = min(stall_s, self._due - time.monotonic())
            if left <= 0:
                self._stalled = True
                self._call.cancel()
                return


def _refused(error: Any) -> bool:
    return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)


def _word(streams: bool) -> str:
    return "stream" if streams else "unary"


def _left(until: float) -> float:
    return max(0.001, until - time.monotonic())
