from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from transport import backends
from transport.conformance import Backend, Conformance, Pair
from transport.peers import joined, pull, soon, thread

from weightwire.errors import FenceTimeout, PeerLost, PeerStalled
from weightwire.transport.base import ReadGate
from weightwire.transport.faults import Corrupt, Cut, Delay, Drop, Duplicate, FaultPlan, FaultyTransport, Hang
from weightwire.types import Span

ALL = Span(0, 4096)


def faultless(gate: ReadGate | None) -> FaultyTransport:
    return FaultyTransport(backends.inproc(gate), FaultPlan())


class TestFaultlessIsTheInnerTransport(Conformance):
    @pytest.fixture
    def backend(self) -> Backend:
        return Backend(make=faultless)


class Rig:
    """Pairs over tcp or inproc whose reads suffer a plan; closed by the fixture."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def build(self, plan: FaultPlan) -> Pair:
        self.pairs.append(Pair(Backend(make=lambda gate: FaultyTransport(backends.tcp(gate), plan)), 4096, 2, 3))
        return self.pairs[-1]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    for pair in made.pairs:
        pair.target.close()
        pair.source.close()


def test_a_delay_is_a_stall_for_who_waits_too_short_and_no_more(rig: Rig) -> None:
    pair = rig.build(FaultPlan(script={(0, 0): Delay(0.2)}))
    read = pair.connection.read(ALL, pair.into)
    with pytest.raises(PeerStalled):
        read.wait(soon(0.05))
    read.wait(soon())
    assert np.array_equal(joined(pair.parts), pair.content)


def test_a_dropped_read_stalls_for_ever_and_all_behind_it(rig: Rig) -> None:
    pair = rig.build(FaultPlan(script={(0, 1): Drop()}))
    first, second, third = (pair.connection.read(ALL, pair.into) for _ in range(3))
    first.wait(soon())
    for read in (second, third, second):
        with pytest.raises(PeerStalled):
            read.wait(soon(0.05))


def test_a_cut_connection_is_lost_and_stays_lost(rig: Rig) -> None:
    pair = rig.build(FaultPlan(script={(0, 1): Cut()}))
    pair.connection.read(Span(0, 10), pair.into).wait(soon())
    with pytest.raises(PeerLost):
        pair.connection.read(ALL, pair.into).wait(soon())
    with pytest.raises(PeerLost):
        pair.connection.read(ALL, pair.into)


@pytest.mark.parametrize("bits", [1, 3])
def test_h31_corruption_flips_exactly_so_many_bits_of_what_came(rig: Rig, bits: int) -> None:
    plan = FaultPlan(rates=[(1.0, Corrupt(bits))], seed=5)
    landed = []
    for _ in range(2):
        pair = rig.build(plan)
        pair.connection.read(Span(100, 3000), pair.into).wait(soon())
        difference = joined(pair.parts) ^ pair.content
        assert int(np.unpackbits(difference[100:3100]).sum()) == bits
        assert not joined(pair.parts)[:100].any()
        landed.append(joined(pair.parts))
    assert np.array_equal(landed[0], landed[1])  # one seed, one corruption


def test_a_hanging_read_goes_on_when_it_is_released(rig: Rig) -> None:
    hang = Hang(threading.Event())
    pair = rig.build(FaultPlan(script={(0, 0): hang}))
    read = pair.connection.read(ALL, pair.into)
    with pytest.raises(PeerStalled):
        read.wait(soon(0.05))
    hang.release.set()
    read.wait(soon())
    assert np.array_equal(joined(pair.parts), pair.content)


def test_a_hanging_read_is_lost_when_it_is_fenced(rig: Rig) -> None:
    pair = rig.build(FaultPlan(script={(0, 0): Hang()}))
    read = pair.connection.read(ALL, pair.into)
    outcome: list[type[Exception]] = []

    def wait() -> None:
        try:
            read.wait(soon(20))
        except PeerLost as error:
            outcome.append(type(error))

    with thread(wait):
        time.sleep(0.05)
        pair.connection.fence(soon())
    assert outcome == [PeerLost]


def test_h64_a_duplicate_lands_late_on_memory_that_was_refilled(rig: Rig) -> None:
    pair = rig.build(FaultPlan(script={(0, 0): Duplicate(0.5)}))
    pair.connection.read(ALL, pair.into).wait(soon())
    for part in pair.parts:
        part[:] = 0x32
    until = soon()
    while not np.array_equal(joined(pair.parts), pair.content):  # the refill is gone: what a fence is for
        assert time.monotonic() < until
        time.sleep(0.01)


def test_h64_a_fence_stops_the_duplicate(rig: Rig) -> None:
    pair = rig.build(FaultPlan(script={(0, 0): Duplicate(0.1, inverted=True)}))
    pair.connection.read(ALL, pair.into).wait(soon())
    pair.connection.fence(soon())
    for part in pair.parts:
        part[:] = 0x32
    time.sleep(0.3)
    assert np.all(joined(pair.parts) == 0x32)


def test_an_unfenceable_peer_ends_in_a_timeout(rig: Rig) -> None:
    pair = rig.build(FaultPlan(unfenceable=True))
    with pytest.raises(FenceTimeout):
        pair.connection.fence(soon(0.05))


def test_rates_are_repeatable_and_about_right() -> None:
    plan = FaultPlan(rates=[(0.2, Drop()), (0.1, Cut())], seed=3)
    decided = [plan.decide(connection, read) for connection in range(10) for read in range(200)]
    assert decided == [plan.decide(connection, read) for connection in range(10) for read in range(200)]
    assert 300 < decided.count(Drop()) < 500
    assert 100 < decided.count(Cut()) < 220
    assert decided != [FaultPlan(rates=plan.rates, seed=4).decide(c, r) for c in range(10) for r in range(200)]


def test_connections_are_numbered_in_order(rig: Rig) -> None:
    pair = rig.build(FaultPlan(script={(1, 0): Cut()}))
    pull(pair.connection, [ALL], pair.into)
    with pytest.raises(PeerLost):
        pair.connect().read(ALL, pair.into).wait(soon())
