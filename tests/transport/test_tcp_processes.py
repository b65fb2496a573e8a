"""The tcp backend against sources in processes of their own, which are killed, frozen and told to withdraw."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from transport import backends
from transport.peers import LEASE, MIB, Bytes, SourceProcess, joined, pattern, soon, space, thread

from weightwire.errors import GenerationMoved, PeerLost, PeerStalled
from weightwire.transport.base import Registration
from weightwire.transport.tcp import TcpTransport
from weightwire.transport.tcp.connection import TcpConnection, TcpRead
from weightwire.types import Span

NBYTES = 96 * MIB
"""Far more than both sockets' buffers hold."""


class Reader:
    """This process, with empty memory, connected to a source of ``NBYTES`` in another."""

    def __init__(self, source: SourceProcess) -> None:
        self.source = source
        self.transport: TcpTransport = backends.tcp(None)
        memory, self.parts = space(np.zeros(NBYTES, dtype=np.uint8), 5)
        self.into: Registration = self.transport.register(memory)
        self.connection: TcpConnection = self.transport.connect(source.endpoint, LEASE, soon())

    def start(self) -> TcpRead:
        """A read of everything that has really begun, while the source is in the middle of its first 64 MiB."""
        for _ in range(20):
            read = self.connection.read(Span(0, NBYTES), self.into)
            while not self.landed()[:MIB].all():
                with pytest.raises(PeerStalled):
                    read.wait(soon(0.001))
            if not self.landed()[40 * MIB :].any():  # what is left is more than both sockets' buffers hold
                return read
            self.connection.fence(soon())
            for part in self.parts:
                part[:] = 0
            self.connection = self.transport.connect(self.source.endpoint, LEASE, soon())
        raise AssertionError("this machine is too fast to be stopped in the middle of a read")

    def until_withdrawn(self) -> None:
        """Until the source lets nobody begin a read any more."""
        until, other = soon(), self.transport.connect(self.source.endpoint, LEASE, soon())
        with contextlib.suppress(GenerationMoved):
            while True:
                other.read(Span(0, 1), self.into).wait(soon())  # the same byte again
                assert time.monotonic() < until

    def landed(self) -> Bytes:
        return joined(self.parts)


@pytest.fixture(scope="module")
def content() -> Bytes:
    return pattern(NBYTES)


@pytest.fixture
def reader() -> Iterator[Reader]:
    with SourceProcess("transport.backends:tcp", NBYTES, 4) as source:
        made = Reader(source)
        yield made
        made.transport.close()


def test_h26_a_source_killed_in_mid_read_is_lost_at_once(
    reader: Reader, record_property: Callable[[str, object], None]
) -> None:
    read = reader.start()
    reader.source.kill()
    began = time.monotonic()
    with pytest.raises(PeerLost):
        read.wait(soon(20))
    noticed = time.monotonic() - began
    record_property("noticed_s", round(noticed, 4))
    assert noticed < 5.0


def test_h27_a_source_frozen_in_mid_read_stalls_at_the_deadline_and_can_go_on(reader: Reader, content: Bytes) -> None:
    read = reader.start()
    reader.source.freeze()
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(PeerStalled):
            read.wait(soon(0.5))
        assert 0.4 < time.monotonic() - began < 5
    reader.source.resume()
    read.wait(soon(30))
    assert np.array_equal(reader.landed(), content)


def test_h32_a_source_frozen_in_mid_read_and_fenced_writes_nothing_when_it_goes_on(reader: Reader) -> None:
    read = reader.start()
    reader.source.freeze()
    began = time.monotonic()
    reader.connection.fence(soon(20))
    assert time.monotonic() - began < 10
    for part in reader.parts:
        part[:] = 0x76
    reader.source.resume()
    time.sleep(1.0)
    with pytest.raises(PeerLost):
        read.wait(soon())
    assert np.all(reader.landed() == 0x76)


def test_h32_a_fence_from_another_thread_stops_a_receive_at_full_speed(reader: Reader) -> None:
    for attempt in range(8):
        connection = reader.transport.connect(reader.source.endpoint, LEASE, soon())
        read = connection.read(Span(0, NBYTES), reader.into)
        ended: list[type[Exception]] = []

        def wait(read: TcpRead = read, ended: list[type[Exception]] = ended) -> None:
            try:
                read.wait(soon(20))
            except PeerLost as error:
                ended.append(type(error))

        with thread(wait):
            time.sleep(0.003 * (attempt + 1))
            connection.fence(soon())
            for part in reader.parts:
                part[:] = 0x76
        assert read.finished or ended == [PeerLost]
        assert np.all(reader.landed() == 0x76)


def test_h29_a_source_that_withdraws_in_mid_read_cuts_us_off_before_it_changes_a_byte(
    reader: Reader, content: Bytes
) -> None:
    read = reader.start()
    reader.source.order("deregister 0.2")  # nobody takes bytes meanwhile: it must cut
    assert 0.15 < reader.source.answer() < 5.0
    reader.source.order("fill 238")
    reader.source.answer()
    with pytest.raises(PeerLost):
        read.wait(soon())
    landed = reader.landed()
    assert np.all((landed == 0) | (landed == content))
    again = reader.transport.connect(reader.source.endpoint, LEASE, soon())
    with pytest.raises(GenerationMoved):
        again.read(Span(0, 10), reader.into).wait(soon())


def test_h29_a_withdrawal_waits_for_a_read_that_makes_progress(reader: Reader, content: Bytes) -> None:
    read = reader.start()
    reader.source.order("deregister 20")
    reader.until_withdrawn()  # in the middle of the first part, since nobody takes its bytes
    read_error: type[Exception] | None = None
    try:
        read.wait(soon(30))
    except GenerationMoved as error:  # the parts of this long read that had not begun
        read_error = type(error)
    assert read_error is GenerationMoved
    assert reader.source.answer() < 10
    landed = reader.landed()
    assert np.array_equal(landed[: 64 * MIB], content[: 64 * MIB])
    assert np.all((landed == 0) | (landed == content))


def test_a_source_that_closes_ends_its_readers(reader: Reader) -> None:
    read = reader.start()
    reader.source.order("close")
    assert reader.source.answer() < 5
    with pytest.raises(PeerLost):
        read.wait(soon())
    with pytest.raises(PeerLost):
        reader.transport.connect(reader.source.endpoint, LEASE, soon(1))
