"""The tcp backend: for hosts without RDMA, development and CI."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import ClassVar

from weightwire.auth import Secret
from weightwire.errors import AuthError, ConfigError, FenceTimeout, PeerLost, PeerStalled
from weightwire.manifest.address import AddressSpace
from weightwire.transport.base import ReadGate, Registration
from weightwire.transport.ledger import HeldMemory, Ledger
from weightwire.transport.pacing import Pacer
from weightwire.transport.tcp import frames
from weightwire.transport.tcp.connection import TcpConnection
from weightwire.transport.tcp.frames import Endpoint
from weightwire.transport.tcp.greeting import greet_server
from weightwire.transport.tcp.server import Server, Service, listen
from weightwire.transport.tcp.settings import STREAMS, TcpSettings
from weightwire.transport.tcp.stream import OverdueError, Stream

__all__ = ["STREAMS", "TcpTransport"]

_log = logging.getLogger(__name__)


class TcpTransport:
    """A :class:`~weightwire.transport.base.Transport` over plain sockets, authenticated by the shared secret.

    Args:
        secret: both sides hold it; it never crosses the wire.
        gate: asked for every request that is served; ``None`` for one that only reads and listens nowhere.
        host: local address to listen on.
        port: 0 lets the system choose; it is never shared.
        advertise: addresses (or names, looked up here and now) under which readers reach us, best first; at most 8.
            Left out, it is ``host``, which must then be one interface's address.
        settings: bounds.
        pacer: what all readers together are served by; no bound where left out.

    Raises:
        ConfigError: the port is taken, or an address is not usable; names it.
    """

    SOURCE_PACES: ClassVar[bool] = True
    """The serving side keeps to its cap by itself: readers need not."""

    def __init__(
        self,
        secret: Secret,
        gate: ReadGate | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: Sequence[str] | None = None,
        settings: TcpSettings | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self._secret = secret
        self._settings = settings or TcpSettings()
        self._ledger = Ledger()
        self._lock = threading.Lock()
        self._connections: set[TcpConnection] = set()  # until fenced, also where their user has lost them
        self._closed = False
        self._incarnation = secrets.token_bytes(frames.INCARNATION_BYTES)
        self._server: Server | None = None
        if gate is not None:
            self._hosts = _advertised(host, advertise)
            service = Service(secret, self._incarnation, gate, self._ledger, self._settings, pacer or Pacer())
            self._server = Server(listen(host, port), service)

    @property
    def name(self) -> str:
        """Always ``tcp``."""
        return "tcp"

    @property
    def streams(self) -> int:
        """How many connections to one peer pay."""
        return self._settings.streams

    def register(self, memory: AddressSpace) -> HeldMemory:
        """Any host memory, and device memory through a stage of ``memory.STAGE_BYTES`` a stream."""
        return self._ledger.add(memory)

    def describe(self, registration: Registration, lease: bytes) -> bytes:
        """Our addresses, port and incarnation; at most ``frames.MAX_ENDPOINT_BYTES``.

        Args:
            registration: live.
            lease: ``frames.LEASE_BYTES`` bytes.

        Raises:
            ConfigError: this transport only reads, or is closed.
            ValueError: a lease of another size, or memory that is not registered here.
        """
        _check_lease(lease)
        if self._server is None or self._closed:
            raise ConfigError("this tcp transport serves nothing", "make it with a gate, and do not close it")
        if not self._ledger.live(registration):
            raise ValueError("the memory is not registered with this transport")
        return Endpoint(self._hosts, self._server.port, self._incarnation).encode()

    def connect(self, endpoint: bytes, lease: bytes, deadline: float) -> TcpConnection:
        """Try the peer's addresses in order, each with a fair share of the time that is left."""
        _check_lease(lease)
        where = Endpoint.decode(endpoint)
        if self._closed:
            raise PeerLost("this tcp transport is closed", "make a new one")
        connected, peer = _reach(where, deadline)
        stream = Stream(connected, dead_host_s=self._settings.dead_host_s, send_s=self._settings.send_stall_s)
        try:
            greet_server(stream, self._secret, lease, where.incarnation, deadline)
        except OverdueError:
            stream.close()
            raise PeerStalled(f"{peer} accepted but did not answer in time", "read from another peer") from None
        except OSError as error:
            stream.close()
            raise PeerLost(f"{peer} ended the connection at once: {error}", "read from another peer") from None
        except AuthError:
            stream.close()
            raise
        connection = TcpConnection(stream, peer, self._forget, self._settings.read_bytes)
        with self._lock:
            self._connections.add(connection)
        return connection

    def _forget(self, connection: TcpConnection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def deregister(self, registration: Registration, deadline: float) -> None:
        """Serve it no more; connections that are still sending from it at ``deadline`` are cut.

        Raises:
            FenceTimeout: a thread of ours would not leave the memory; keep it alive and unchanged.
        """
        self._ledger.drain(registration, deadline)

    def close(self) -> None:
        """Cut and fence everything; idempotent.

        Raises:
            FenceTimeout: a thread of ours did not leave some memory; keep all registered memory alive.
        """
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        if self._server is not None:
            self._server.close()
        deadline = time.monotonic() + self._settings.close_s
        failed: FenceTimeout | None = None
        for connection in connections:
            try:
                connection.fence(deadline)
            except FenceTimeout as error:
                failed = error
        for registration in self._ledger.live_registrations():
            self._ledger.drain(registration, deadline)
        if failed is not None:
            raise failed


def _check_lease(lease: bytes) -> None:
    if len(lease) != frames.LEASE_BYTES:
        raise ValueError(f"a lease of {len(lease)} bytes; leases have {frames.LEASE_BYTES}")


def _advertised(host: str, advertise: Sequence[str] | None) -> tuple[str, ...]:
    names = [host] if advertise is None else list(advertise)
    addresses = tuple(dict.fromkeys(_address(name) for name in names))
    if not 1 <= len(addresses) <= frames.MAX_HOSTS:
        raise ConfigError(f"{len(addresses)} addresses to advertise", f"give 1 to {frames.MAX_HOSTS}")
    return addresses


def _address(name: str) -> str:
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"cannot advertise {name}: {error.strerror}", "give an address that readers reach") from error
    if address in {"0.0.0.0", "::"}:  # noqa: S104  # refused here, not bound
        raise ConfigError(f"{address} is no address that a reader can reach", "give the addresses to advertise")
    if not frames.is_address(address):
        raise ConfigError(f"cannot advertise {name} ({address})", "give an address without a zone")
    return address


def _reach(where: Endpoint, deadline: float) -> tuple[socket.socket, str]:
    failures: list[str] = []
    stalled = False
    for at, host in enumerate(where.hosts):
        share = (deadline - time.monotonic()) / (len(where.hosts) - at)
        try:
            return _dial(host, where.port, share), f"{host}:{where.port}"
        except TimeoutError:
            stalled = True
            failures.append(f"{host}:{where.port} did not answer")
        except OSError as error:
            failures.append(f"{host}:{where.port} {error.strerror or error}")
    error_type = PeerStalled if stalled else PeerLost
    raise error_type(
        f"cannot reach the peer: {', '.join(failures)}", "check the address that it advertises, and firewalls"
    )


def _dial(host: str, port: int, seconds: float) -> socket.socket:
    if seconds <= 0:
        raise TimeoutError
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dialled = socket.socket(family, socket.SOCK_STREAM)
    try:
        dialled.settimeout(seconds)
        dialled.connect((host, port))
    except BaseException:
        dialled.close()
        raise
    return dialled
