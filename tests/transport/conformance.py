"""What every backend must do, whatever it is made of. Subclass ``Conformance`` and give it a ``backend`` fixture.

class TestMine(Conformance):
    @pytest.fixture
    def backend(self) -> Backend:
        return Backend(make=…, child="transport.backends:mine")
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from transport.peers import LEASE, MIB, Bytes, Gate, SourceProcess, joined, pattern, pull, soon, space, thread

from weightwire.errors import AuthError, GenerationMoved, PeerLost, PeerStalled, ProtocolError, TransferError
from weightwire.transport.base import MAX_ENDPOINT_BYTES, Connection, ReadGate, Registration, Transport
from weightwire.types import Span


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend under test, and what it can do.

    Attributes:
        make: a fresh transport; with a gate it serves, without it only reads.
        child: ``module:function`` equal to ``make``, for a source in another process; None where no other process
            can be reached.
        stranger: makes a reader that holds another secret; None where the backend asks for none.
        gate_sees_reads: every read asks the gate (one-sided backends ask nobody).
        frozen_source_stalls: a read from a stopped process cannot finish (cross-memory attach can).
        connect_s: the most that connecting to nobody may take beyond its deadline.
    """

    make: Callable[[ReadGate | None], Transport]
    child: str | None = None
    stranger: Callable[[], Transport] | None = None
    gate_sees_reads: bool = True
    frozen_source_stalls: bool = True
    connect_s: float = 5.0


class Pair:
    """A source and a target of one backend in this process, connected."""

    def __init__(self, backend: Backend, nbytes: int, source_pieces: int = 1, target_pieces: int = 1) -> None:
        self.content = pattern(nbytes)
        self.gate = Gate()
        self.source = backend.make(self.gate)
        self.target = backend.make(None)
        self.source_space, self.source_parts = space(self.content, source_pieces, seed=1)
        self.offered = self.gate.registration = self.source.register(self.source_space)
        self.endpoint = self.source.describe(self.offered, LEASE)
        self.into, self.parts = self.empty(target_pieces)
        self.connection = self.connect()

    def empty(self, pieces: int = 1) -> tuple[Registration, list[Bytes]]:
        """Another registered target memory, all zero."""
        memory, parts = space(np.zeros_like(self.content), pieces, seed=2)
        return self.target.register(memory), parts

    def connect(self) -> Connection:
        return self.target.connect(self.endpoint, LEASE, soon())

    def close(self) -> None:
        self.connection.fence(soon())
        self.target.close()
        self.source.close()


Build = Callable[..., Pair]


class Conformance:
    """The suite. Tests take ``backend`` from the subclass."""

    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError

    @pytest.fixture
    def build(self, backend: Backend) -> Iterator[Build]:
        pairs: list[Pair] = []

        def make(nbytes: int, source_pieces: int = 1, target_pieces: int = 1) -> Pair:
            pairs.append(Pair(backend, nbytes, source_pieces, target_pieces))
            return pairs[-1]

        yield make
        for pair in pairs:
            pair.close()

    @pytest.fixture
    def remote(self, backend: Backend) -> Iterator[tuple[SourceProcess, Transport, Registration, list[Bytes]]]:
        """A source of 48 MiB in a process of its own, and empty target memory here."""
        if backend.child is None:
            pytest.skip("this backend reaches no other process")
        with SourceProcess(backend.child, 48 * MIB, 5) as source:
            transport = backend.make(None)
            memory, parts = space(np.zeros(48 * MIB, dtype=np.uint8), 3)
            yield source, transport, transport.register(memory), parts
            transport.close()

    @pytest.mark.parametrize("seed", range(4))
    def test_random_spans_arrive_exactly_and_nothing_else_is_touched(self, build: Build, seed: int) -> None:
        chance = random.Random(seed)
        pair = build(300_000, chance.choice([1, 3, 40]), chance.choice([1, 7, 50]))
        expected = np.zeros_like(pair.content)
        spans = []
        for _ in range(20):
            begin = chance.randrange(300_000)
            span = Span(begin, min(chance.choice([1, 7, 4096, 60_000]), 300_000 - begin))
            spans.append(span)
            expected[span.offset : span.end] = pair.content[span.offset : span.end]
        pull(pair.connection, spans, pair.into)
        assert np.array_equal(joined(pair.parts), expected)

    def test_the_whole_space_in_one_read(self, build: Build) -> None:
        pair = build(9 * MIB + 5, 2000, 1500)
        pair.connection.read(Span(0, 9 * MIB + 5), pair.into).wait(soon(30))
        assert np.array_equal(joined(pair.parts), pair.content)

    def test_a_zero_length_read_finishes_and_touches_nothing(self, build: Build) -> None:
        pair = build(1000)
        pair.connection.read(Span(500, 0), pair.into).wait(soon())
        assert not joined(pair.parts).any()

    def test_a_read_that_finished_means_that_all_before_it_finished(self, build: Build) -> None:
        pair = build(3 * MIB, 3, 2)
        reads = [pair.connection.read(Span(at * MIB, MIB), pair.into) for at in range(3)]
        reads[2].wait(soon())
        assert np.array_equal(joined(pair.parts), pair.content)
        for read in reads:
            read.wait(soon(0.5))

    def test_a_span_outside_our_memory_is_refused_before_anything_is_sent(self, build: Build) -> None:
        pair = build(1000)
        for span in (Span(990, 11), Span(1000, 1), Span(5000, 8), Span(0, 1001)):
            with pytest.raises(IndexError):
                pair.connection.read(span, pair.into)
        assert pair.gate.asked == []
        pair.connection.read(Span(990, 10), pair.into).wait(soon())  # the connection is none the worse

    def test_a_span_outside_the_source_s_memory_is_refused(self, backend: Backend, build: Build) -> None:
        pair = build(1000)
        memory, parts = space(np.zeros(3000, dtype=np.uint8))
        larger = pair.target.register(memory)
        with pytest.raises((ProtocolError, IndexError)):
            pair.connection.read(Span(900, 200), larger).wait(soon())
        assert not backend.gate_sees_reads or not joined(parts).any()

    def test_the_gate_is_asked_for_every_request_and_its_no_arrives(self, backend: Backend, build: Build) -> None:
        if not backend.gate_sees_reads:
            pytest.skip("reads are one-sided")
        pair = build(1000)
        pull(pair.connection, [Span(0, 10), Span(10, 10)], pair.into)
        assert pair.gate.asked == [Span(0, 10), Span(10, 10)]
        pair.gate.moved = True
        with pytest.raises(GenerationMoved):
            pair.connection.read(Span(20, 10), pair.into).wait(soon())
        assert not joined(pair.parts)[20:].any()

    def test_another_lease_reads_nothing(self, backend: Backend, build: Build) -> None:
        if not backend.gate_sees_reads:
            pytest.skip("the lease is checked where the endpoint is handed out")
        pair = build(1000)
        stranger = pair.target.connect(pair.endpoint, bytes(16), soon())
        with pytest.raises(ProtocolError):
            stranger.read(Span(0, 1000), pair.into).wait(soon())
        stranger.fence(soon())
        assert not joined(pair.parts).any()

    def test_deregistered_memory_is_served_no_more(self, backend: Backend, build: Build) -> None:
        if not backend.gate_sees_reads:
            pytest.skip("reads are one-sided")
        pair = build(1000)
        pair.source.deregister(pair.offered, soon())
        pair.source.deregister(pair.offered, soon())
        with pytest.raises(GenerationMoved):
            pair.connection.read(Span(0, 1000), pair.into).wait(soon())
        assert not joined(pair.parts).any()

    def test_h29_deregister_then_change_never_mixes_bytes(self, backend: Backend, build: Build) -> None:
        if not backend.gate_sees_reads:
            pytest.skip("reads are one-sided: the digest finds it")
        pair = build(16 * MIB, 4)
        results: list[bool] = []

        def read() -> None:
            try:
                pair.connection.read(Span(0, 16 * MIB), pair.into).wait(soon())
            except TransferError:
                results.append(False)
            else:
                results.append(True)

        with thread(read):
            time.sleep(0.002)
            pair.source.deregister(pair.offered, soon())
            for part in pair.source_parts:
                part[:] = 0xEE
        if results == [True]:
            assert np.array_equal(joined(pair.parts), pair.content)
        else:
            landed = joined(pair.parts)
            assert np.all((landed == 0) | (landed == pair.content))

    def test_nothing_can_be_read_after_a_fence(self, build: Build) -> None:
        pair = build(1000)
        pending = pair.connection.read(Span(0, 1000), pair.into)
        pair.connection.fence(soon())
        pair.connection.fence(soon())
        for part in pair.parts:
            part[:] = 0x54
        with pytest.raises(PeerLost):
            pair.connection.read(Span(0, 10), pair.into)
        with pytest.raises(PeerLost):
            pending.wait(soon())
        assert np.all(joined(pair.parts) == 0x54)

    def test_a_fence_ends_one_connection_and_no_other(self, build: Build) -> None:
        pair = build(1000)
        other = pair.connect()
        pair.connection.fence(soon())
        other.read(Span(0, 1000), pair.into).wait(soon())
        other.fence(soon())
        assert np.array_equal(joined(pair.parts), pair.content)

    def test_many_connections_at_once(self, build: Build) -> None:
        pair = build(4 * MIB, 9, 4)
        targets = [pair.empty(at + 1) for at in range(4)]

        def read(into: Registration) -> None:
            connection = pair.connect()
            pull(connection, [Span(at * MIB // 2, MIB // 2) for at in range(8)], into)
            connection.fence(soon())

        threads = [threading.Thread(target=read, args=(into,)) for into, _ in targets]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)
        for _, parts in targets:
            assert np.array_equal(joined(parts), pair.content)

    def test_connecting_to_nobody_is_bounded(self, backend: Backend, build: Build) -> None:
        pair = build(1000)
        pair.source.close()
        began = time.monotonic()
        with pytest.raises((PeerLost, PeerStalled)):
            pair.target.connect(pair.endpoint, LEASE, soon(1.0))
        assert time.monotonic() - began < 1.0 + backend.connect_s

    def test_a_malformed_endpoint_is_refused(self, build: Build) -> None:
        pair = build(1000)
        for endpoint in (b"", b"\xff" * 100, b"{}", b"[" * 4000, pair.endpoint[:-1]):
            with pytest.raises(ProtocolError):
                pair.target.connect(endpoint, LEASE, soon())

    def test_h49_another_secret_is_refused_and_reads_nothing(self, backend: Backend, build: Build) -> None:
        if backend.stranger is None:
            pytest.skip("this backend asks for no secret")
        pair = build(1000)
        stranger = backend.stranger()
        with pytest.raises(AuthError):
            stranger.connect(pair.endpoint, LEASE, soon())
        stranger.close()
        assert pair.gate.asked == []

    def test_everything_says_what_it_is(self, build: Build) -> None:
        pair = build(1000)
        assert pair.source.name == pair.target.name
        assert pair.connection.depth >= 1
        assert pair.connection.path.split("/")[0] == pair.source.name
        assert len(pair.endpoint) <= MAX_ENDPOINT_BYTES
        assert pair.offered.memory is pair.source_space

    def test_closing_twice_is_harmless_and_ends_connections(self, build: Build) -> None:
        pair = build(1000)
        pair.target.close()
        pair.target.close()
        with pytest.raises(PeerLost):
            pair.connection.read(Span(0, 10), pair.into)

    def test_another_process_is_read_exactly(
        self, remote: tuple[SourceProcess, Transport, Registration, list[Bytes]]
    ) -> None:
        source, transport, into, parts = remote
        connection = transport.connect(source.endpoint, LEASE, soon())
        pull(connection, [Span(at * 4 * MIB, 4 * MIB) for at in range(12)], into)
        connection.fence(soon())
        assert np.array_equal(joined(parts), pattern(48 * MIB))

    def test_h27_a_frozen_source_is_noticed_at_the_deadline(
        self, backend: Backend, remote: tuple[SourceProcess, Transport, Registration, list[Bytes]]
    ) -> None:
        if not backend.frozen_source_stalls:
            pytest.skip("the kernel reads a stopped process's memory")
        source, transport, into, _ = remote
        connection = transport.connect(source.endpoint, LEASE, soon())
        source.freeze()
        read = connection.read(Span(0, 48 * MIB), into)
        began = time.monotonic()
        with pytest.raises(PeerStalled):
            read.wait(soon(0.4))
        assert 0.3 < time.monotonic() - began < 5
        connection.fence(soon())

    def test_h32_a_fenced_source_that_goes_on_later_writes_nothing(
        self, backend: Backend, remote: tuple[SourceProcess, Transport, Registration, list[Bytes]]
    ) -> None:
        source, transport, into, parts = remote
        connection = transport.connect(source.endpoint, LEASE, soon())
        source.freeze()
        reads = [connection.read(Span(at * 24 * MIB, 24 * MIB), into) for at in range(2)]
        try:
            reads[1].wait(soon(0.3))
        except PeerStalled:
            pass
        else:
            assert not backend.frozen_source_stalls
        connection.fence(soon())
        for part in parts:
            part[:] = 0x76
        source.resume()
        time.sleep(0.7)
        assert np.all(joined(parts) == 0x76)
        again = transport.connect(source.endpoint, LEASE, soon())  # and the source is none the worse
        again.read(Span(0, 48 * MIB), into).wait(soon())
        again.fence(soon())
        assert np.array_equal(joined(parts), pattern(48 * MIB))

    def test_h26_a_killed_source_is_noticed(
        self, remote: tuple[SourceProcess, Transport, Registration, list[Bytes]]
    ) -> None:
        source, transport, into, _ = remote
        connection = transport.connect(source.endpoint, LEASE, soon())
        source.freeze()  # so that it cannot have answered
        read = connection.read(Span(0, 48 * MIB), into)
        source.kill()
        with pytest.raises((PeerLost, PeerStalled)):
            read.wait(soon(5))
        connection.fence(soon())
