"""The reference backend: both sides in one process, a read is a copy made by ``wait``. Deterministic, no threads."""

from __future__ import annotations

import math
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator

from weightwire.errors import ConfigError, FenceTimeout, PeerLost, PeerStalled, ProtocolError, WeightwireError
from weightwire.manifest.address import AddressSpace
from weightwire.transport import memory
from weightwire.transport.base import ReadGate, Registration
from weightwire.transport.ledger import HeldMemory, Ledger
from weightwire.types import Span

_MAGIC = b"weightwire-inproc"
_ID_BYTES = 16
_STEP_BYTES = 1024 * 1024
_DEPTH = 2

_serving: weakref.WeakValueDictionary[bytes, InprocTransport] = weakref.WeakValueDictionary()
_serving_lock = threading.Lock()


class InprocTransport:
    """A :class:`~weightwire.transport.base.Transport` between objects of one process; nobody else can reach it.

    Args:
        gate: asked for every read; ``None`` for one that only reads.
    """

    def __init__(self, gate: ReadGate | None = None) -> None:
        self._gate = gate
        self._ledger = Ledger()
        self._incarnation = secrets.token_bytes(_ID_BYTES)
        self._connections: weakref.WeakSet[InprocConnection] = weakref.WeakSet()
        self._closed = False
        if gate is not None:
            with _serving_lock:
                _serving[self._incarnation] = self

    @property
    def name(self) -> str:
        """Always ``inproc``."""
        return "inproc"

    @property
    def streams(self) -> int:
        """How many connections to one peer pay."""
        return 2

    def register(self, memory: AddressSpace) -> HeldMemory:
        """Any memory of this process."""
        return self._ledger.add(memory)

    def describe(self, registration: Registration, lease: bytes) -> bytes:  # noqa: ARG002  # the lease travels apart
        """A name that means something in this process only.

        Raises:
            ConfigError: this transport only reads, or is closed.
            ValueError: memory that is not registered here.
        """
        if self._gate is None or self._closed:
            raise ConfigError("this inproc transport serves nothing", "make it with a gate, and do not close it")
        if not self._ledger.live(registration):
            raise ValueError("the memory is not registered with this transport")
        return _MAGIC + self._incarnation

    def connect(self, endpoint: bytes, lease: bytes, deadline: float) -> InprocConnection:
        """Find the peer in this process; see the contract."""
        if len(endpoint) != len(_MAGIC) + _ID_BYTES or not endpoint.startswith(_MAGIC):
            raise ProtocolError("an inproc endpoint is malformed", "do not use this peer")
        if time.monotonic() >= deadline:
            raise PeerStalled("no time was left to connect", "give a later deadline")
        with _serving_lock:
            peer = _serving.get(endpoint[len(_MAGIC) :])
        if peer is None or self._closed:
            raise PeerLost("no such inproc peer in this process", "read from another peer")
        connection = InprocConnection(peer, lease)
        self._connections.add(connection)
        return connection

    def serve(self, lease: bytes, span: Span, into: AddressSpace, stop: Stop, deadline: float) -> None:
        """Copy ``span`` from what the gate gives into the same bytes of ``into``; called by readers.

        Raises:
            GenerationMoved: as the gate says, or the memory was withdrawn.
            ProtocolError: as the gate says.
            PeerLost: this transport was closed, or ``stop`` was set.
            PeerStalled: not done by ``deadline``.
        """
        gate = self._gate
        if gate is None or self._closed:
            raise PeerLost("the inproc peer is closed", "read from another peer")
        registration = gate.admit(lease, span)
        with self._ledger.use(registration, stop.set):
            for step in _steps(span):
                stop.check(deadline)
                _copy(registration.memory, into, step)

    def deregister(self, registration: Registration, deadline: float) -> None:
        """See the contract; a copy under way is cut between two steps of 1 MiB."""
        self._ledger.drain(registration, deadline)

    def close(self) -> None:
        """See the contract."""
        self._closed = True
        with _serving_lock:
            _serving.pop(self._incarnation, None)
        deadline = time.monotonic()
        for connection in list(self._connections):
            connection.fence(deadline + 5.0)
        for registration in self._ledger.live_registrations():
            self._ledger.drain(registration, deadline)


class Stop:
    """Ends a copy from another thread, at its next step."""

    def __init__(self) -> None:
        self._reason = ""

    def set(self, reason: str = "the source withdrew the memory") -> None:
        """Ask for it; returns at once."""
        self._reason = self._reason or reason

    def check(self, deadline: float) -> None:
        """Raise PeerLost if it was asked for, PeerStalled if ``deadline`` is over."""
        if self._reason:
            raise PeerLost(f"the inproc connection is over: {self._reason}", "read from another peer")
        if time.monotonic() >= deadline:
            raise PeerStalled("an inproc read was not done in time", "fence it and read from another peer")


class InprocRead:
    """One read; see :class:`~weightwire.transport.base.Read`."""

    def __init__(self, connection: InprocConnection, span: Span, into: Registration) -> None:
        self._connection = connection
        self.span = span
        self.into = into
        self.error: WeightwireError | None = None
        self.finished = False

    def wait(self, deadline: float) -> None:
        """Do this read, and all before it."""
        self._connection.copy_until(self, deadline)
        if self.error is not None:
            raise type(self.error)(self.error.problem, self.error.remedy)


class InprocConnection:
    """A :class:`~weightwire.transport.base.Connection` to another transport of this process."""

    def __init__(self, peer: InprocTransport, lease: bytes) -> None:
        self._peer = peer
        self._lease = lease
        self._stop = Stop()
        self._copying = threading.Lock()
        self._reads: deque[InprocRead] = deque()

    @property
    def path(self) -> str:
        """Always ``inproc``."""
        return "inproc"

    @property
    def streams(self) -> int:
        """How many connections to one peer pay."""
        return 2

    @property
    def depth(self) -> int:
        """Always 2, so that its users pipeline as they do elsewhere."""
        return _DEPTH

    def read(self, span: Span, into: Registration) -> InprocRead:
        """Note the read; ``wait`` does it."""
        into.memory.check(span)  # IndexError before the gate is asked
        self._stop.check(math.inf)
        read = InprocRead(self, span, into)
        self._reads.append(read)
        return read

    def copy_until(self, read: InprocRead, deadline: float) -> None:
        """Do the noted reads in order until ``read`` has ended; what ``InprocRead.wait`` does."""
        while not read.finished:
            with self._copying:
                self._stop.check(deadline)
                self._copy_next(deadline)

    def fence(self, deadline: float) -> None:
        """See the contract."""
        self._stop.set("it was fenced")
        if not self._copying.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise FenceTimeout("an inproc copy did not stop in time", "keep the memory of its reads, do not refill it")
        self._reads.clear()
        self._copying.release()

    def _copy_next(self, deadline: float) -> None:
        read = self._reads[0]
        try:
            self._peer.serve(self._lease, read.span, read.into.memory, self._stop, deadline)
        except PeerStalled:
            raise  # still outstanding; the next wait copies it from its beginning
        except IndexError:
            read.error = ProtocolError("the span is outside what the source holds", "ask for what the manifest says")
        except WeightwireError as error:
            read.error = error.with_traceback(None)  # its frames hold the memory
        read.finished = True
        self._reads.popleft()


def _steps(span: Span) -> Iterator[Span]:
    for offset in range(span.offset, span.end, _STEP_BYTES):
        yield Span(offset, min(_STEP_BYTES, span.end - offset))


def _copy(source: AddressSpace, target: AddressSpace, span: Span) -> None:
    into = target.slices(span)
    for segment in into:
        pieces = source.slices(Span(segment.offset, segment.nbytes))
        if memory.on_host([segment]):
            memory.load(pieces, memory.view(segment.address, segment.nbytes))
        else:
            stage = memoryview(bytearray(segment.nbytes))
            memory.load(pieces, stage)
            memory.store(stage, [segment])
