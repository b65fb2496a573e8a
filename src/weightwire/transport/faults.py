"""A transport that misbehaves on purpose, around any real one: for tests and for trying out recovery.

What goes wrong is decided on the reading side, read by read, by a :class:`FaultPlan`: a pure function of its seed, the
number of the connection and the number of the read on it, so that a failure can be repeated whatever the threads do.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightwire.errors import FenceTimeout, PeerLost, PeerStalled
from weightwire.manifest.address import AddressSpace
from weightwire.transport import memory
from weightwire.transport.base import Connection, Read, Registration, Transport
from weightwire.types import Span


@dataclass(frozen=True, slots=True)
class Delay:
    """The read takes ``seconds`` more."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drop:
    """The read, and all after it on its connection, never finishes."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection breaks."""


@dataclass(frozen=True, slots=True)
class Corrupt:
    """The read finishes, and ``bits`` bits of what it brought (chosen by the plan's seed) are flipped."""

    bits: int = 1


@dataclass(frozen=True, slots=True)
class Hang:
    """The read does not finish before ``release`` is set; then it goes on as if nothing had been."""

    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Duplicate:
    """``seconds`` after the read has finished its bytes are written a second time, unless it was fenced by then.

    Attributes:
        seconds: how late.
        inverted: write the complement instead, so that the second write is seen even over equal bytes.
    """

    seconds: float
    inverted: bool = False


_TICK_S = 0.01
_COMPLEMENT = bytes(255 - byte for byte in range(256))

Fault = Delay | Drop | Cut | Corrupt | Hang | Duplicate


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """Which reads go wrong, and how. The same plan gives the same faults.

    Attributes:
        script: faults by (number of the connection on this transport, number of the read on that connection), from 0.
        rates: for reads that the script does not name: probability and fault, tried in order with one draw each.
        seed: for the draws, and for the places of corruption.
        unfenceable: fences end in FenceTimeout at their deadline, and late writes go on after them.
    """

    script: Mapping[tuple[int, int], Fault] = field(default_factory=dict)
    rates: Sequence[tuple[float, Fault]] = ()
    seed: int = 0
    unfenceable: bool = False

    def decide(self, connection: int, read: int) -> Fault | None:
        """What happens to this read, if anything."""
        if (connection, read) in self.script:
            return self.script[connection, read]
        chance = self.chance(connection, read)
        return next((fault for rate, fault in self.rates if chance.random() < rate), None)

    def chance(self, connection: int, read: int) -> random.Random:
        """Random numbers of this read alone."""
        return random.Random(f"{self.seed}/{connection}/{read}")  # noqa: S311  # must be repeatable


class FaultyTransport:
    """A :class:`~weightwire.transport.base.Transport` that is ``inner``, but for what ``plan`` does to its reads."""

    def __init__(self, inner: Transport, plan: FaultPlan) -> None:
        self._inner = inner
        self._plan = plan
        self._lock = threading.Lock()
        self._count = 0
        self._connections: weakref.WeakSet[FaultyConnection] = weakref.WeakSet()

    @property
    def name(self) -> str:
        """The inner transport's."""
        return self._inner.name

    @property
    def streams(self) -> int:
        """The inner transport's."""
        return self._inner.streams

    def register(self, memory: AddressSpace) -> Registration:
        """As the inner transport does."""
        return self._inner.register(memory)

    def describe(self, registration: Registration, lease: bytes) -> bytes:
        """As the inner transport does."""
        return self._inner.describe(registration, lease)

    def connect(self, endpoint: bytes, lease: bytes, deadline: float) -> FaultyConnection:
        """As the inner transport does; connections are numbered in the order in which this is called."""
        with self._lock:
            number = self._count
            self._count += 1
        connection = FaultyConnection(self._inner.connect(endpoint, lease, deadline), self._plan, number)
        self._connections.add(connection)
        return connection

    def deregister(self, registration: Registration, deadline: float) -> None:
        """As the inner transport does."""
        self._inner.deregister(registration, deadline)

    def close(self) -> None:
        """As the inner transport does; late writes end too, unless they are unfenceable."""
        if not self._plan.unfenceable:
            for connection in list(self._connections):
                connection.silence()
        self._inner.close()


class FaultyConnection:
    """A :class:`~weightwire.transport.base.Connection` whose reads suffer what the plan says."""

    def __init__(self, inner: Connection, plan: FaultPlan, number: int) -> None:
        self.inner = inner
        self._plan = plan
        self._number = number
        self._reads = 0
        self._state = threading.Condition()
        self._fenced = False
        self._stuck = False

    @property
    def path(self) -> str:
        """The inner connection's."""
        return self.inner.path

    @property
    def depth(self) -> int:
        """The inner connection's."""
        return self.inner.depth

    def read(self, span: Span, into: Registration) -> FaultyRead:
        """Start the read, and its fault if it has one."""
        number = self._reads
        fault = self._plan.decide(self._number, number)
        if isinstance(fault, Cut):
            into.memory.check(span)
            self.inner.fence(time.monotonic() + 5.0)
            read: Read = _Broken()
        else:
            read = self.inner.read(span, into)
        self._reads += 1
        chance = self._plan.chance(self._number, number)
        return FaultyRead(self, read, fault, _Place(span, into.memory, chance))

    def fence(self, deadline: float) -> None:
        """As the inner connection does; a late second write is fenced with it."""
        if self._plan.unfenceable:
            time.sleep(max(0.0, deadline - time.monotonic()))
            raise FenceTimeout("a peer could not be stopped (as planned)", "do not refill the memory of its reads")
        self.silence()
        self.inner.fence(deadline)

    def silence(self) -> None:
        """No fault writes or waits any more once this returns; what ``fence`` does besides fencing the inner one."""
        with self._state:
            self._fenced = True
            self._state.notify_all()

    def sleep_until(self, when: float, deadline: float) -> None:
        """Let time pass until ``when``.

        Raises:
            PeerStalled: ``deadline`` came first.
            PeerLost: the connection was fenced meanwhile.
        """
        with self._state:
            self._state.wait_for(lambda: self._fenced, max(0.0, min(when, deadline) - time.monotonic()))
            if self._fenced:
                raise PeerLost("the connection was fenced", "read from another peer")
        if when > deadline:
            raise PeerStalled("the peer did not send in time (as planned)", "fence it and read from another peer")

    def jam(self) -> None:
        """Nothing on this connection finishes from now on."""
        self._stuck = True

    @property
    def stuck(self) -> bool:
        """Whether ``jam`` was called."""
        return self._stuck

    def write_late(self, place: _Place, data: bytes, seconds: float) -> None:
        """Write ``data`` once more after ``seconds``, in a thread, unless fenced by then."""
        timer = threading.Timer(seconds, self._write, (place, data))
        timer.daemon = True
        timer.start()

    def write_now(self, place: _Place, bits: int) -> None:
        """Flip ``bits`` bits, unless fenced by now."""
        with self._state:
            if not self._fenced:
                place.flip(bits)

    def _write(self, place: _Place, data: bytes) -> None:
        with self._state:  # a fence waits for this lock, so that nothing is written once it has returned
            if not self._fenced:
                place.store(data)


class FaultyRead:
    """A :class:`~weightwire.transport.base.Read` that suffers one fault at most."""

    def __init__(self, connection: FaultyConnection, inner: Read, fault: Fault | None, place: _Place) -> None:
        self._connection = connection
        self._inner = inner
        self._fault = fault
        self._place = place
        self._asked = time.monotonic()
        self._done = False

    def wait(self, deadline: float) -> None:
        """Wait as the inner read does, before or after what the fault does."""
        if self._done:
            return
        self._before(deadline)
        self._inner.wait(deadline)
        self._done = True
        self._after()

    def _before(self, deadline: float) -> None:
        fault, connection = self._fault, self._connection
        if isinstance(fault, Drop) or connection.stuck:
            connection.jam()
            connection.sleep_until(float("inf"), deadline)
        elif isinstance(fault, Delay):
            connection.sleep_until(self._asked + fault.seconds, deadline)
        elif isinstance(fault, Hang):
            while not fault.release.is_set():
                connection.sleep_until(time.monotonic() + _TICK_S, deadline)

    def _after(self) -> None:
        fault = self._fault
        if isinstance(fault, Corrupt):
            self._connection.write_now(self._place, fault.bits)
        elif isinstance(fault, Duplicate):
            data = self._place.load()
            if fault.inverted:
                data = data.translate(_COMPLEMENT)
            self._connection.write_late(self._place, data, fault.seconds)


class _Broken:
    """A read on a connection that was cut."""

    def wait(self, deadline: float) -> None:
        del deadline  # it is over at once
        raise PeerLost("the connection broke (as planned)", "read from another peer")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a read puts its bytes, for writing there behind its back."""

    span: Span
    space: AddressSpace
    chance: random.Random

    def load(self) -> bytes:
        data = bytearray(self.span.nbytes)
        memory.load(self.space.slices(self.span), memoryview(data))
        return bytes(data)

    def store(self, data: bytes) -> None:
        memory.store(memoryview(data), self.space.slices(self.span))

    def flip(self, bits: int) -> None:
        """Flip ``bits`` different bits."""
        for bit in self.chance.sample(range(self.span.nbytes * 8), min(bits, self.span.nbytes * 8)):
            at = Span(self.span.offset + bit // 8, 1)
            byte = bytearray(1)
            memory.load(self.space.slices(at), memoryview(byte))
            byte[0] ^= 1 << bit % 8
            memory.store(memoryview(byte), self.space.slices(at))
