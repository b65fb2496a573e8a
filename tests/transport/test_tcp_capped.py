"""A bandwidth cap at the serving side, over real sockets: upper bounds hold however slow the machine is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from transport.peers import LEASE, MIB, SECRET, Gate, joined, pattern, pull, soon, space

from weightwire.errors import TransferError
from weightwire.transport.pacing import BURST_S, Pacer
from weightwire.transport.tcp import TcpTransport
from weightwire.transport.tcp.server import NICENESS
from weightwire.types import Span

RATE = 16e6
SIZE = 16 * MIB
SPANS = [Span(at, MIB) for at in range(0, SIZE, MIB)]


@contextmanager
def capped(pacer: Pacer, pieces: int = 3) -> Iterator[tuple[TcpTransport, Gate, bytes]]:
    gate = Gate()
    transport = TcpTransport(SECRET, gate, pacer=pacer)
    gate.registration = transport.register(space(pattern(SIZE), pieces)[0])
    yield transport, gate, transport.describe(gate.registration, LEASE)
    transport.close()


class Reader:
    """Reads ``spans`` in a thread of its own; ``done`` bytes so far."""

    def __init__(self, endpoint: bytes, spans: list[Span]) -> None:
        self.transport = TcpTransport(SECRET)
        memory, self.parts = space(np.zeros(SIZE, dtype=np.uint8))
        self.into = self.transport.register(memory)
        self.connection = self.transport.connect(endpoint, LEASE, soon())
        self.spans, self.done, self.error = spans, 0, ""
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        try:
            for span in self.spans:
                pull(self.connection, [span], self.into)
                self.done += span.nbytes
        except TransferError as error:
            self.error = error.problem

    def finish(self) -> None:
        self.thread.join(30)
        self.transport.close()


def test_all_readers_together_stay_below_the_cap_and_share_it() -> None:
    waited: list[float] = []
    with capped(Pacer(RATE, waited=waited.append), pieces=300) as (_, _, endpoint):
        began = time.monotonic()
        readers = [Reader(endpoint, SPANS[:8]) for _ in range(3)]
        readers[0].thread.join(30)
        shares = [reader.done for reader in readers]
        elapsed = time.monotonic() - began  # after them: they go on
        for reader in readers:
            reader.finish()
        total = time.monotonic() - began
    assert sum(shares) <= RATE * (elapsed + BURST_S) + 5 * MIB
    assert total >= 24 * MIB / RATE - BURST_S - 0.05
    assert min(shares) >= 3 * MIB, shares  # nobody starves
    assert waited
    assert all((joined(reader.parts)[: 8 * MIB] == pattern(SIZE)[: 8 * MIB]).all() for reader in readers)


LEAST = 19
"""The most that niceness can be."""


@pytest.mark.parametrize("own", [0, 5, LEAST])
def test_threads_that_serve_give_way_to_what_the_process_computes(own: int) -> None:
    """``own``: more niceness than these tests have, of the thread that accepts, as of a process that is nice itself."""
    mine = min(LEAST, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + own)
    before = set(threading.enumerate())
    with capped(Pacer(RATE)) as (_, _, endpoint):
        (accepting,) = set(threading.enumerate()) - before
        assert accepting.native_id is not None
        os.setpriority(os.PRIO_PROCESS, accepting.native_id, mine)
        reader = Reader(endpoint, SPANS[:4])
        until = soon()
        while not reader.done:
            assert time.monotonic() < until
            time.sleep(0.01)
        niceness = {
            thread.name: os.getpriority(os.PRIO_PROCESS, thread.native_id)
            for thread in set(threading.enumerate()) - before
            if thread.native_id is not None
        }
        reader.finish()
    assert niceness["weightwire-tcp-serve"] == min(LEAST, mine + NICENESS)
    assert niceness["weightwire-tcp-accept"] == mine


def test_the_caps_of_several_sources_add_up() -> None:
    count = 4
    with ExitStack() as stack:
        endpoints = [stack.enter_context(capped(Pacer(RATE)))[2] for _ in range(count)]
        began = time.monotonic()
        readers = [Reader(endpoint, SPANS) for endpoint in endpoints]
        for reader in readers:
            reader.finish()
        elapsed = time.monotonic() - began
    assert [reader.done for reader in readers] == [SIZE] * count
    assert elapsed >= SIZE / RATE - BURST_S - 0.05, "each keeps to its own cap"
    assert elapsed < count * SIZE / RATE - BURST_S, "one cap for all would have taken so long"


def test_a_withdrawal_does_not_wait_for_readers_that_wait_for_their_turn() -> None:
    with capped(Pacer(1e5)) as (transport, gate, endpoint):
        reader = Reader(endpoint, SPANS)  # a hundred seconds of work, ten for each read
        until = soon()
        while not gate.asked and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        began = time.monotonic()
        assert gate.registration is not None
        transport.deregister(gate.registration, soon(30))
        assert time.monotonic() - began < 5
        reader.finish()
        assert "is over" in reader.error


def test_closing_does_not_wait_either() -> None:
    pacer = Pacer(1e5)
    pacer.reserve(10_000_000)  # the next turn comes in a hundred seconds
    with capped(pacer) as (transport, _, endpoint):
        readers = [Reader(endpoint, SPANS) for _ in range(8)]
        time.sleep(0.2)
        began = time.monotonic()
        transport.close()
        assert time.monotonic() - began < 10
        for reader in readers:
            reader.finish()
            assert reader.error
    assert not [thread for thread in threading.enumerate() if thread.name == "weightwire-tcp-serve"]


@pytest.mark.parametrize("pieces", [1, 2000])
def test_bytes_are_the_same_however_they_are_cut(pieces: int) -> None:
    with capped(Pacer(4e8), pieces=pieces) as (_, _, endpoint):
        reader = Reader(endpoint, [Span(0, SIZE)])
        reader.finish()
    assert (joined(reader.parts) == pattern(SIZE)).all()


def test_the_first_bytes_of_a_read_can_be_used_while_others_are_coming() -> None:
    with capped(Pacer(RATE)) as (_, _, endpoint):
        transport = TcpTransport(SECRET)
        memory, parts = space(np.zeros(SIZE, dtype=np.uint8), 3)
        into = transport.register(memory)
        connection = transport.connect(endpoint, LEASE, soon())
        before, read = connection.read(Span(0, 5), into), connection.read(Span(5, SIZE - 5), into)
        read.wait_for(2 * MIB, soon(20))
        assert before.finished
        assert not read.finished
        content = pattern(SIZE)
        assert np.array_equal(joined(parts)[: 2 * MIB + 5], content[: 2 * MIB + 5])
        assert not joined(parts)[SIZE // 2 :].any(), "all of it was waited for"
        read.wait_for(MIB, soon(-1))  # in place already: no wait
        read.wait(soon(20))
        assert np.array_equal(joined(parts), content)
        transport.close()
