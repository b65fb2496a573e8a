from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from transport.peers import LEASE, MIB, Gate, joined, pattern, soon, space

from weightwire.errors import PeerLost, PeerStalled
from weightwire.target.pacing import PacedConnection, patience_s
from weightwire.transport.base import Registration
from weightwire.transport.inproc import InprocTransport
from weightwire.transport.pacing import BURST_S, Pacer
from weightwire.types import Span

SIZE = 4 * MIB


class Place:
    def __init__(self) -> None:
        self.gate = Gate()
        self.serving, self.reading = InprocTransport(self.gate), InprocTransport()
        self.gate.registration = self.serving.register(space(pattern(SIZE), 5)[0])
        memory, self.parts = space(np.zeros(SIZE, dtype=np.uint8), 3)
        self.into: Registration = self.reading.register(memory)

    def connect(self, pacer: Pacer) -> PacedConnection:
        assert self.gate.registration is not None
        endpoint = self.serving.describe(self.gate.registration, LEASE)
        return PacedConnection(self.reading.connect(endpoint, LEASE, soon()), pacer)


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.reading.close()
    made.serving.close()


def test_connections_under_one_grant_keep_to_it_together(place: Place) -> None:
    waited: list[float] = []
    pacer = Pacer(8e6, waited=waited.append)
    connections = [place.connect(pacer) for _ in range(2)]
    began = time.monotonic()
    reads = [each.read(Span(at, 2 * MIB), place.into) for each, at in zip(connections, (0, 2 * MIB), strict=True)]
    threads = [threading.Thread(target=read.wait, args=(soon(),)) for read in reads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - began >= SIZE / 8e6 - BURST_S - 0.05
    assert (joined(place.parts) == pattern(SIZE)).all()
    assert waited
    assert max(span.nbytes for span in place.gate.asked) <= pacer.piece


def test_where_the_grant_is_wide_a_read_starts_at_once_and_whole(place: Place) -> None:
    connection = place.connect(Pacer(1e12))
    read = connection.read(Span(0, SIZE), place.into)
    assert read.unstarted == 0
    read.wait(soon())
    assert place.gate.asked == [Span(0, SIZE)]


def test_a_read_that_is_late_can_be_waited_for_again(place: Place) -> None:
    connection = place.connect(Pacer(8e6))
    read = connection.read(Span(0, 2 * MIB), place.into)
    with pytest.raises(PeerStalled):
        read.wait(soon(0.05))
    read.wait(soon())
    assert (joined(place.parts)[: 2 * MIB] == pattern(SIZE)[: 2 * MIB]).all()


def test_h32_a_fence_does_not_wait_for_a_turn(place: Place) -> None:
    pacer = Pacer(1e5)
    pacer.reserve(10_000_000)  # the next turn comes in a hundred seconds
    connection = place.connect(pacer)
    errors: list[PeerLost] = []
    read = connection.read(Span(0, SIZE), place.into)

    def wait() -> None:
        try:
            read.wait(soon(60))
        except PeerLost as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    connection.fence(soon())
    thread.join(20)
    assert time.monotonic() - began < 5
    assert errors
    before = joined(place.parts).copy()
    time.sleep(0.1)
    assert (joined(place.parts) == before).all()


def test_a_span_outside_is_refused_before_anything_is_asked(place: Place) -> None:
    with pytest.raises(IndexError):
        place.connect(Pacer(1e6)).read(Span(SIZE - 1, 2), place.into)
    assert place.gate.asked == []


def test_a_capped_peer_is_given_twice_the_time_that_its_cap_takes() -> None:
    mib = 1024 * 1024
    assert patience_s(2.0, 8 * mib) == 10.0
    assert patience_s(2.0, 8 * mib, granted=100 * mib) == 10.0  # the cap is no bound on patience
    assert patience_s(2.0, 8 * mib, granted=mib / 2) == 34.0
    assert patience_s(2.0, 1024 * mib) == 66.0
