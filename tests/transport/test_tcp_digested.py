"""Leaves that are hashed on their way from the socket into memory."""

from __future__ import annotations

import itertools
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from manifest_support import reference_digest
from transport.peers import LEASE, MIB, SECRET, Gate, joined, pattern, soon, space, thread

from weightwire.errors import GenerationMoved, NotYet, PeerLost, PeerStalled
from weightwire.manifest.host_digest import ArrivingDigests, HostDigests
from weightwire.manifest.host_library import HostLibrary, loaded
from weightwire.transport.base import DigestingRead
from weightwire.transport.pacing import Pacer
from weightwire.transport.tcp import TcpTransport, frames
from weightwire.transport.tcp.stream import LOCAL_BUFFER, Stream
from weightwire.types import Span

SIZE = 20 * MIB + 77
SPANS = [Span(at, min(MIB, SIZE - at)) for at in range(0, SIZE, MIB)]
pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None and not isinstance(loaded(), HostLibrary), reason="no compiled digest"
)


class Ends:
    """A source, a connection to it, and the memory that it fills."""

    def __init__(self, pacer: Pacer, pieces: int) -> None:
        self.gate = Gate()
        self.source = TcpTransport(SECRET, self.gate, pacer=pacer)
        self.gate.registration = self.source.register(space(pattern(SIZE), 5)[0])
        self.target = TcpTransport(SECRET)
        memory, self.parts = space(np.zeros(SIZE, dtype=np.uint8), pieces)
        self.into = self.target.register(memory)
        self.connection = self.target.connect(self.source.describe(self.gate.registration, LEASE), LEASE, soon())
        self.digests = HostDigests(memory, SPANS)

    def read(self, first: int, end: int) -> tuple[DigestingRead, ArrivingDigests]:
        read = self.connection.read(Span(SPANS[first].offset, SPANS[end - 1].end - SPANS[first].offset), self.into)
        arriving = self.digests.arriving(first, end)
        assert isinstance(read, DigestingRead)
        assert arriving is not None
        return read, arriving


@contextmanager
def opened(pacer: Pacer | None = None, pieces: int = 3) -> Iterator[Ends]:
    ends = Ends(pacer or Pacer(), pieces)
    yield ends
    ends.connection.fence(soon())
    ends.source.close()
    ends.target.close()


def expected(first: int, end: int) -> bytes:
    content = pattern(SIZE)
    return b"".join(reference_digest(content[span.offset : span.end].tobytes()) for span in SPANS[first:end])


@pytest.mark.parametrize("pieces", [1, 7, 5000])
def test_reads_one_behind_the_other_land_and_have_their_digests(pieces: int) -> None:
    with opened(pieces=pieces) as ends:
        cuts = [0, 3, 4, 15, len(SPANS)]
        for (read, arriving), (first, end) in zip(
            [ends.read(first, end) for first, end in itertools.pairwise(cuts)], itertools.pairwise(cuts), strict=True
        ):
            read.wait_digested(arriving, soon())
            assert arriving.digests() == expected(first, end)
        assert np.array_equal(joined(ends.parts), pattern(SIZE))


def test_what_was_received_before_is_hashed_too() -> None:
    with opened() as ends:
        read, arriving = ends.read(0, 4)
        read.wait_for(MIB + 5, soon())
        read.wait_digested(arriving, soon())
        assert arriving.digests() == expected(0, 4)


def test_a_read_of_several_requests_is_hashed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_READ_BYTES", MIB + 1000)
    with opened() as ends:
        read, arriving = ends.read(0, 6)
        read.wait_digested(arriving, soon())
        assert arriving.digests() == expected(0, 6)


def test_a_read_before_it_that_nobody_waited_for_lands_as_well() -> None:
    with opened() as ends:
        first, _ = ends.read(0, 2)
        read, arriving = ends.read(2, 4)
        read.wait_digested(arriving, soon())
        first.wait(soon(-1))  # finished already
        assert np.array_equal(joined(ends.parts)[: 4 * MIB], pattern(SIZE)[: 4 * MIB])


@pytest.mark.parametrize("no", [NotYet, GenerationMoved])
def test_a_refusal_arrives_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch, no: type[Exception]) -> None:
    with opened() as ends:

        def refuse(*_: object) -> None:
            raise no("not now", "later")

        with monkeypatch.context() as patched:
            patched.setattr(ends.gate, "admit", refuse)
            read, arriving = ends.read(0, 2)
            with pytest.raises(no):
                read.wait_digested(arriving, soon())
        assert not joined(ends.parts).any()
        read, arriving = ends.read(0, 2)  # the connection goes on
        read.wait_digested(arriving, soon())
        assert arriving.digests() == expected(0, 2)


def test_h27_a_slow_source_stalls_at_the_deadline_and_can_be_waited_for_again() -> None:
    with opened(Pacer(8e6)) as ends:
        read, arriving = ends.read(0, 4)
        with pytest.raises(PeerStalled):
            read.wait_digested(arriving, soon(0.1))
        assert 0 < arriving.received < arriving.nbytes
        again = ends.digests.arriving(0, 4)
        assert again is not None
        read.wait_digested(again, soon(20))
        assert again.digests() == expected(0, 4)


def test_h32_a_fence_stops_it_and_nothing_is_written_afterwards() -> None:
    with opened(Pacer(8e6)) as ends:
        read, arriving = ends.read(0, len(SPANS))
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                read.wait_digested(arriving, soon(30))
            except PeerLost as error:
                errors.append(error)

        with thread(wait):
            until(lambda: arriving.received > 0)
            ends.connection.fence(soon(5))
            before = joined(ends.parts).copy()
        assert errors
        assert before.any()
        assert not before.all()
        assert np.array_equal(joined(ends.parts), before)


def until(true: Callable[[], bool]) -> None:
    deadline = soon(10)
    while not true():
        assert soon(0) < deadline


@pytest.mark.parametrize(("own", "near"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_buffers_are_small_where_both_ends_have_one_address_only(own: str, near: bool) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname(), source_address=(own, 0)) as connected,
        listening.accept()[0],
    ):
        tuned = connected.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        assert tuned != 2 * LOCAL_BUFFER
        Stream(connected, dead_host_s=10, send_s=10)
        found = {connected.getsockopt(socket.SOL_SOCKET, which) for which in (socket.SO_RCVBUF, socket.SO_SNDBUF)}
        assert (found == {2 * LOCAL_BUFFER}) is near  # the kernel doubles what is asked for
