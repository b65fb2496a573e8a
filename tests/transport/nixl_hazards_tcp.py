"""Hazards of nixl over UCX's TCP, where a source can be caught in mid-read. Run by ``test_nixl`` with UCX_TLS=tcp."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from transport import nixl_backends
from transport.nixl_reader import NBYTES, Reader, new_source, reading
from transport.peers import LEASE, SECRET, SourceProcess, pattern, soon, thread

from weightwire.errors import FenceTimeout, PeerLost, PeerStalled, TransferError
from weightwire.transport.nixl import NixlTransport, connection
from weightwire.transport.nixl.connection import NixlRead
from weightwire.types import Span


@pytest.fixture(scope="module")
def source() -> Iterator[SourceProcess]:
    """One that the tests leave as it was: starting a process takes long."""
    with new_source() as made:
        yield made


@pytest.fixture
def reader(source: SourceProcess) -> Iterator[Reader]:
    with reading(source) as made:
        yield made


@pytest.fixture
def doomed() -> Iterator[Reader]:
    """With a source of its own, which the test ends."""
    with new_source() as made, reading(made) as reader:
        yield reader


def test_h26_a_source_killed_in_mid_read_is_lost_in_bounded_time(doomed: Reader) -> None:
    read = doomed.start()
    doomed.source.kill()
    began = time.monotonic()
    with pytest.raises(PeerLost):
        read.wait(soon(20))
    assert time.monotonic() - began < 5.0
    with pytest.raises(PeerLost):
        doomed.connection.read(Span(0, 10), doomed.into)
    doomed.connection.fence(soon(5))


def test_h27_a_source_frozen_in_mid_read_stalls_at_the_deadline_and_can_go_on(reader: Reader) -> None:
    read = reader.start()
    reader.source.freeze()
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(PeerStalled):
            read.wait(soon(0.4))
        assert 0.3 < time.monotonic() - began < 3.0
    reader.source.resume()
    read.wait(soon(20))
    assert np.array_equal(reader.landed(), pattern(NBYTES))


def test_h29_deregistering_stops_serving_and_the_source_lives(doomed: Reader) -> None:
    """Ending a NIXL agent in the middle of an answer may crash the source: it is parked, and reads nothing more."""
    read = doomed.start()
    doomed.source.order("deregister 5")
    assert doomed.source.answer() < 5
    doomed.source.order("fill 238")
    doomed.source.answer()
    with pytest.raises((PeerStalled, PeerLost)):
        read.wait(soon(1))
    landed, content = doomed.landed(), pattern(NBYTES)
    assert np.all((landed == content) | (landed == 0))
    with pytest.raises((PeerLost, PeerStalled)):
        doomed.transport.connect(doomed.source.endpoint, LEASE, soon(1))
    doomed.source.order("close")
    doomed.source.answer()


def test_h26_a_fence_lets_answers_under_way_arrive(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX may abort a source if its reader leaves in the middle of an answer."""
    monkeypatch.setattr(connection, "DRAIN_S", 20.0)  # enough on any machine
    read = reader.start()
    assert isinstance(read, NixlRead)
    reader.source.freeze()
    with pytest.raises(PeerStalled):  # what it sent has arrived; what was asked for meanwhile has not
        read.wait(soon(0.4))
    later = threading.Timer(0.2, reader.source.resume)
    later.start()
    reader.connection.fence(soon(25))
    later.join()
    asked = NBYTES - sum(piece.nbytes for piece in read.pieces)
    assert np.count_nonzero(reader.landed()) == asked < NBYTES
    assert reader.connect().path == "nixl/ucx:tcp"


def test_h32_what_was_fenced_while_its_source_was_frozen_never_lands(doomed: Reader) -> None:
    """The naive way is no fence: with transfers released, the peer removed and the memory deregistered, but the agent
    (with a progress thread) alive, 864 to 927 MB of 1 GiB were seen to land after SIGCONT.
    """
    read = doomed.start()
    doomed.source.freeze()
    errors: list[type[BaseException]] = []

    def wait() -> None:
        try:
            read.wait(soon(20))
        except TransferError as error:
            errors.append(type(error))

    with thread(wait):
        time.sleep(0.3)
        began = time.monotonic()
        doomed.connection.fence(soon(5))
        assert time.monotonic() - began < 5.0
    assert errors == [PeerLost]
    doomed.refill(0x5A)
    doomed.source.resume()
    time.sleep(2)
    assert np.all(doomed.landed() == 0x5A)


def test_h47_a_fence_that_is_late_says_so_and_goes_on_in_the_background(reader: Reader) -> None:
    reader.start()
    with reader.connection._lock:  # as if the library did not come back
        began = time.monotonic()
        with pytest.raises(FenceTimeout):
            reader.connection.fence(soon(0.2))
        assert time.monotonic() - began < 3.0
        assert reader.connection.uses(reader.into), "condemned memory is kept alive"
    reader.connection.fence(soon(5))
    assert not reader.connection.uses(reader.into)


def test_h46_tcp_is_named_and_refused_where_rdma_is_required(source: SourceProcess) -> None:
    strict = NixlTransport(SECRET, require_rdma=True)
    with pytest.raises(TransferError, match=r"nixl/ucx:tcp, and RDMA is required; repair"):
        strict.connect(source.endpoint, LEASE, soon())
    strict.close()
    lenient = nixl_backends.nixl(None)
    assert lenient.connect(source.endpoint, LEASE, soon()).path == "nixl/ucx:tcp"
    lenient.close()


def test_h46_tcp_that_nobody_asked_for_is_refused(source: SourceProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "all")  # here; the source still offers nothing but tcp
    transport = nixl_backends.nixl(None)
    with pytest.raises(TransferError, match=r"would go over nixl/ucx:tcp; read over the tcp transport"):
        transport.connect(source.endpoint, LEASE, soon())
    transport.close()


def test_a_connection_to_a_frozen_source_is_bounded(source: SourceProcess) -> None:
    transport = nixl_backends.nixl(None)
    source.freeze()
    began = time.monotonic()
    with pytest.raises((PeerStalled, PeerLost)):
        transport.connect(source.endpoint, LEASE, soon(0.5))
    assert time.monotonic() - began < 3.0
    source.resume()
    transport.close()
    ending = [each for each in threading.enumerate() if each.name.startswith("nixl-end")]
    for each in ending:
        each.join(5)
    assert not any(each.is_alive() for each in ending)
