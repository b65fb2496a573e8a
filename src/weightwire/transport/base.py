"""The narrow seam between weightwire and a wire: five methods a transport, two a connection.

Everything else (chunking, retries, digests, fairness, choosing peers) lives above it. Every backend passes the one
conformance suite in ``tests/transport/conformance.py``.

A read names *logical* bytes (:class:`~weightwire.types.Span`); each side maps them to its own memory with its own
:class:`~weightwire.manifest.address.AddressSpace`, so a peer can never make us touch memory that we did not register.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from weightwire.manifest.address import AddressSpace
from weightwire.manifest.host_digest import ArrivingDigests
from weightwire.types import Span


class Registration(Protocol):
    """Memory that a transport may serve from or read into, until ``deregister``."""

    @property
    def memory(self) -> AddressSpace:
        """The registered memory, kept alive by this object."""
        ...


class ReadGate(Protocol):
    """The source's say in every read that it can see: asked once per request, from the transport's threads."""

    def admit(self, lease: bytes, span: Span) -> Registration:
        """What to serve ``span`` from.

        Raises:
            GenerationMoved: the lease is over because the source withdrew or changed what it had published.
            NotYet: this source is still filling, and ``span`` is not there yet.
            ProtocolError: the lease is unknown, or ``span`` is outside what may be read under it.
        """
        ...


class Read(Protocol):
    """One read that is under way."""

    def wait(self, deadline: float) -> None:
        """Return once all bytes are in place. On some backends this call *does* the receiving.

        Args:
            deadline: ``time.monotonic()`` value.

        Raises:
            PeerStalled: not finished at the deadline; the read is still outstanding, so fence before the memory is
                used for anything else.
            PeerLost: the connection broke.
            GenerationMoved: the source says that the lease is over.
            NotYet: the source does not have these bytes yet; nothing was written, and the connection goes on.
            ProtocolError: the peer answered outside the protocol.
        """
        ...


@runtime_checkable
class GrowingRead(Read, Protocol):
    """A read whose bytes come in logical order, so that the first of them can be digested while others are coming."""

    def wait_for(self, nbytes: int, deadline: float) -> None:
        """Return once the first ``nbytes`` bytes of it are in place; otherwise as ``wait``."""
        ...


@runtime_checkable
class DigestingRead(GrowingRead, Protocol):
    """One whose bytes can be digested on their way into host memory, while they are in a cache."""

    def wait_digested(self, arriving: ArrivingDigests, deadline: float) -> None:
        """As ``wait``, where the read is of just the leaves of ``arriving``, which has their digests afterwards."""
        ...


@runtime_checkable
class Connection(Protocol):
    """One stream of reads from one peer. Driven by one thread; only ``fence`` may be called from another.

    Reads finish in the order in which they were started.
    """

    @property
    def path(self) -> str:
        """What really carries the bytes, for logs and reports: ``tcp``, ``inproc``, ``nixl/ucx:cma``."""
        ...

    @property
    def depth(self) -> int:
        """How many reads are worth having under way at a time (at least 1)."""
        ...

    def read(self, span: Span, into: Registration) -> Read:
        """Start reading ``span`` into the same logical bytes of ``into``; returns at once.

        Raises:
            IndexError: ``span`` is not inside ``into`` (checked before anything is sent).
            PeerLost: the connection is broken or fenced.
        """
        ...

    def fence(self, deadline: float) -> None:
        """Once this returns, this peer can no longer write into any memory of ours. Ends the connection; idempotent.

        Raises:
            FenceTimeout: it could not be made sure by ``deadline`` (``time.monotonic()``); the memory of all
                outstanding reads is condemned: keep it alive and never refill it.
        """
        ...


@runtime_checkable
class Transport(Protocol):
    """A way for bytes to travel. One object a process and backend; safe to call from several threads."""

    @property
    def name(self) -> str:
        """``inproc``, ``tcp`` or ``nixl``."""
        ...

    @property
    def streams(self) -> int:
        """How many connections to one peer pay."""
        ...

    def register(self, memory: AddressSpace) -> Registration:
        """Make ``memory`` readable (as a source) or writable (as a target). Registers whole regions.

        Raises:
            TransferError: the backend cannot use this memory; names the device and the reason.
        """
        ...

    def describe(self, registration: Registration, lease: bytes) -> bytes:
        """How a reader that holds ``lease`` reaches ``registration``: opaque, handed out only under a read lease.

        At most ``MAX_ENDPOINT_BYTES``. What comes back from a peer is untrusted until ``connect`` has checked it.
        """
        ...

    def connect(self, endpoint: bytes, lease: bytes, deadline: float) -> Connection:
        """Connect to a peer whose ``describe`` gave ``endpoint``.

        Raises:
            PeerLost: nobody answers.
            PeerStalled: no answer by ``deadline`` (``time.monotonic()``).
            AuthError: the peer does not hold our secret, or refuses ours.
            ProtocolError: ``endpoint`` or an answer is malformed.
        """
        ...

    def deregister(self, registration: Registration, deadline: float) -> None:
        """Stop serving ``registration`` and wait until no read of it is under way; then it may be changed or freed.

        Idempotent. Readers that are still at it at ``deadline`` are cut off where the backend can do that.
        """
        ...

    def close(self) -> None:
        """End all serving and all connections; idempotent, bounded."""
        ...


def source_paces(transport: Transport) -> bool:
    """Whether a source keeps to its cap by itself on this transport (``SOURCE_PACES``); else its readers have to."""
    return bool(getattr(transport, "SOURCE_PACES", False))


def sees_reads(transport: Transport) -> bool:
    """Whether the gate is asked for every read (``GATE_SEES_READS``); else memory is reached one-sided."""
    return bool(getattr(transport, "GATE_SEES_READS", True))


def worthwhile_bytes(connection: Connection) -> int:
    """What one read should ask for at least, where so much is missing (``read_bytes``); 0 where it does not matter."""
    return int(getattr(connection, "read_bytes", 0))


def step_bytes(connection: Connection) -> int:
    """Of a growing read, what is worth waiting for at a time (``step_bytes``); 0 where less always is."""
    return int(getattr(connection, "step_bytes", 0))


def streams_that_pay(connection: Connection) -> int:
    """How many connections to this peer do, now that the way is known (``streams``); 0 where the transport knew."""
    return int(getattr(connection, "streams", 0))


MAX_ENDPOINT_BYTES = 64 * 1024 * 1024
"""A description of 100,000 tensors over ``nixl`` is about 5 MB; more than this is refused unread."""
