"""The nixl backend: RDMA, NVLink, EFA, and memory of another process on the same host."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
import weakref
from typing import ClassVar

from weightwire.auth import Secret
from weightwire.errors import ConfigError, FenceTimeout, PeerLost, TransferError
from weightwire.manifest.address import AddressSpace
from weightwire.transport.base import ReadGate, Registration
from weightwire.transport.nixl import agent as nixl_agent
from weightwire.transport.nixl import exit as process_exit
from weightwire.transport.nixl.agent import Agent
from weightwire.transport.nixl.connection import NixlConnection
from weightwire.transport.nixl.endpoint import Endpoint
from weightwire.transport.nixl.lanes import tcp_is_the_only_network
from weightwire.transport.nixl.registration import NixlRegistration, registrable
from weightwire.transport.nixl.server import Server
from weightwire.transport.nixl.spare import SpareAgent

CLOSE_S = 5.0
ABANDON_S = 1.0
"""How long a failed ``connect`` waits for its agent to end; after that it ends in the background."""

_log = logging.getLogger(__name__)


class NixlTransport:
    """A :class:`~weightwire.transport.base.Transport` over NIXL's UCX backend.

    Reads are one-sided: the source's processor takes no part, so the gate is *not* asked (``GATE_SEES_READS``), a lease
    bounds only who is told the endpoint, and a source that changes memory under a reader is found by digest alone.
    Whoever holds an endpoint could also write to the registered memory: hand it out to trusted readers, and digest
    again what was served.

    Args:
        secret: both sides hold it; an endpoint made with another one is refused.
        gate: anything but ``None`` makes this a transport that can serve; it is asked nothing.
        require_rdma: refuse to read over what UCX does not tell, too. (TCP under UCX is refused unless ``UCX_TLS``
            names it, for it is slow and endangers the source: ``lanes.tcp_is_asked_for``.)
        untrusted_readers: readers must not be able to write; refused with this backend where it serves.

    Raises:
        ConfigError: ``nixl`` is not installed, or readers are not trusted.
    """

    GATE_SEES_READS: ClassVar[bool] = False

    def __init__(
        self,
        secret: Secret,
        gate: ReadGate | None = None,
        *,
        require_rdma: bool = False,
        untrusted_readers: bool = False,
    ) -> None:
        if untrusted_readers and gate is not None:
            raise ConfigError(
                "nixl lets readers write to what they read, and readers are not trusted", "serve over tcp"
            )
        nixl_agent.bindings()
        self._secret = secret
        self._serves = gate is not None
        self._require_rdma = require_rdma
        self._incarnation = secrets.token_hex(8)
        self._counter = itertools.count(1)
        self._lock = threading.Lock()
        self._registrations: set[NixlRegistration] = set()
        self._connections: weakref.WeakSet[NixlConnection] = weakref.WeakSet()
        self._closed = False
        process_exit.close_at_exit(self)
        name = self._server_name if self._serves else self._reader_name
        self._spare = SpareAgent(name, serves=self._serves and not tcp_is_the_only_network())

    def _server_name(self) -> str:
        return f"{self._incarnation}/s{next(self._counter)}"

    def _reader_name(self) -> str:
        return f"{self._incarnation}/{next(self._counter)}"

    @property
    def streams(self) -> int:
        """How many connections to one peer pay: a single one keeps any wire busy, and each needs an agent."""
        return 1

    @property
    def name(self) -> str:
        """Always ``nixl``."""
        return "nixl"

    def register(self, memory: AddressSpace) -> NixlRegistration:
        """See the contract; where it serves, the regions are registered with NIXL now.

        A reader's memory is registered with each connection that reads into it, by its first ``read``.
        """
        regions = registrable(memory)
        server: Server | None = None
        if self._serves:
            server = Server(self._spare.take(), regions)
        registration = NixlRegistration(memory, regions, server)
        with self._lock:
            if self._closed:
                raise TransferError("this nixl transport is closed", "make a new one")
            self._registrations.add(registration)
        return registration

    def describe(self, registration: Registration, lease: bytes) -> bytes:
        """NIXL's metadata (with keys to read *and write*), and where each byte lies.

        Raises:
            ConfigError: this transport only reads, or is closed.
            ValueError: memory that is not registered here (any more).
        """
        if not self._serves or self._closed:
            raise ConfigError("this nixl transport serves nothing", "make it with a gate, and do not close it")
        if not isinstance(registration, NixlRegistration) or registration not in self._registrations:
            raise ValueError("the memory is not registered with this transport")
        assert registration.server is not None
        return Endpoint(registration.server.name, registration.metadata, registration.memory).encode(
            self._secret, lease
        )

    def connect(self, endpoint: bytes, lease: bytes, deadline: float) -> NixlConnection:
        """Read a few bytes of the peer through a new agent; see the contract.

        Raises:
            TransferError: UCX would read over TCP; see ``require_rdma``.
        """
        peer = Endpoint.decode(endpoint, self._secret, lease)
        with process_exit.at_work():
            agent = self._spare.take() if not self._serves else Agent(self._reader_name(), serves=False)
            connection = NixlConnection(agent, peer, require_rdma=self._require_rdma)
            with self._lock:
                closed = self._closed
                self._connections.add(connection)
            try:
                if closed:
                    raise PeerLost("this nixl transport is closed", "make a new one")
                connection.open(deadline)
            except TransferError:
                _abandon(connection)
                raise
        return connection

    def deregister(self, registration: Registration, deadline: float) -> None:
        """End what serves the registration, and fence our own connections that read into it.

        Reads under way cannot be seen, so nothing is waited for: the leases must be over before. Readers over RDMA are
        cut off, since their keys die with the agent. Over TCP (see ``Server``) nothing is read for them any more: they
        stall until their deadline, and the agent is never freed. A reader on this host over cross-memory attach is
        *not* cut off: it reads this process's memory without it, and only digests tell.

        Raises:
            FenceTimeout: an agent could not be ended in time; keep the memory alive and unchanged.
        """
        if not isinstance(registration, NixlRegistration):
            raise TypeError("not a registration of a nixl transport")
        with self._lock:
            self._registrations.discard(registration)
            readers = [connection for connection in self._connections if connection.uses(registration)]
        for connection in readers:
            connection.fence(deadline)
        late = FenceTimeout("a nixl serving agent could not be ended in time", "keep its memory alive and unchanged")
        registration.withdrawal.run(deadline, late)

    def close(self) -> None:
        """Fence all connections and end all serving agents, within ``CLOSE_S``; idempotent.

        Raises:
            FenceTimeout: one could not be ended; keep all registered memory alive.
        """
        deadline = time.monotonic() + CLOSE_S
        self._spare.close()
        with self._lock:
            self._closed = True
            connections, registrations = list(self._connections), list(self._registrations)
        failed: FenceTimeout | None = None
        for connection in connections:
            try:
                connection.fence(deadline)
            except FenceTimeout as error:
                failed = error
        for registration in registrations:
            try:
                self.deregister(registration, deadline)
            except FenceTimeout as error:
                failed = error
        if failed is not None:
            raise failed


def _abandon(connection: NixlConnection) -> None:
    try:
        connection.fence(time.monotonic() + ABANDON_S)
    except FenceTimeout as error:  # nothing was read but into its own scratch memory
        _log.warning("a failed connection is still ending: %s", error)
