"""Hazards of nixl with UCX's own choice, cross-memory attach on one host. Run by ``test_nixl``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from transport import nixl_backends
from transport.nixl_reader import NBYTES, Reader, new_source, reading
from transport.peers import LEASE, SECRET, Gate, SourceProcess, joined, pattern, soon, space

from weightwire.errors import ConfigError, PeerLost, PeerStalled, TransferError
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport.nixl import NixlTransport, connection
from weightwire.transport.nixl.agent import Agent
from weightwire.transport.nixl.connection import CopyingRead
from weightwire.types import Span

needs_two_cores = pytest.mark.skipif(connection.COPYING_STREAMS < 2, reason="one core copies beside nothing")


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


def test_h29_memory_that_changes_under_a_reader_is_for_the_digest_to_find(doomed: Reader) -> None:
    doomed.connection.read(Span(0, NBYTES), doomed.into).wait(soon(20))
    assert np.array_equal(doomed.landed(), pattern(NBYTES))
    doomed.source.order("deregister 5")
    doomed.source.answer()
    doomed.source.order("fill 238")
    doomed.source.answer()
    try:
        doomed.connection.read(Span(0, NBYTES), doomed.into).wait(soon(20))
    except (PeerLost, PeerStalled):
        doomed.connection.fence(soon(5))
    else:
        assert np.all(doomed.landed() == 238), "cross-memory attach asks nobody: the new bytes arrive without an error"


def test_h26_a_killed_source_is_lost(doomed: Reader) -> None:
    doomed.source.kill()
    with pytest.raises(PeerLost):
        doomed.connection.read(Span(0, NBYTES), doomed.into).wait(soon(10))


def test_h47_the_same_peer_again_and_again_under_new_names(reader: Reader) -> None:
    names = {reader.connection._agent.name}
    content = pattern(NBYTES)
    for at in range(25):
        reader.connection.fence(soon(5))
        reader.connection = reader.connect()
        names.add(reader.connection._agent.name)
        size = reader.parts[0].nbytes // 25
        span = Span(at * size, size)
        reader.connection.read(span, reader.into).wait(soon(5))
        assert np.array_equal(reader.parts[0][span.offset : span.end], content[span.offset : span.end])
    assert len(names) == 26
    assert max(map(len, names)) <= 31


def test_h46_the_path_is_named(reader: Reader) -> None:
    assert reader.connection.path == "nixl/ucx:cma"


def test_h35_a_device_that_is_not_there_is_an_error_and_registers_nothing() -> None:
    kept = np.zeros(4096, dtype=np.uint8)
    address = int(kept.ctypes.data)
    memory = AddressSpace([Segment(0, address, 4096, "cuda:7")], [Region(address, 4096, "cuda:7")], kept)
    source = nixl_backends.nixl(Gate())
    with pytest.raises(TransferError, match="cuda:7"):
        source.register(memory)
    source.close()


def test_h35_what_nixl_refuses_to_register_is_an_error_that_names_the_device() -> None:
    kept = np.zeros(4096, dtype=np.uint8)
    agent = Agent("0123456789abcdef/s999", serves=False)
    with pytest.raises(TransferError, match=r"NIXL cannot register 1 regions on cuda:7"):
        agent.register([Region(int(kept.ctypes.data), 4096, "cuda:7")])
    agent.destroy()


def test_h40_memory_at_an_old_address_is_another_registration() -> None:
    gate = Gate()
    source, target = nixl_backends.nixl(gate), nixl_backends.nixl(None)
    memory, parts = space(pattern(5000))
    first = source.register(memory)
    old = source.describe(first, LEASE)
    source.deregister(first, soon())
    parts[0][:] = 9
    again = source.register(memory)
    with pytest.raises((PeerLost, PeerStalled)):
        target.connect(old, LEASE, soon(1))
    empty, landed = space(np.zeros(5000, dtype=np.uint8))
    connection = target.connect(source.describe(again, LEASE), LEASE, soon())
    connection.read(Span(0, 5000), target.register(empty)).wait(soon())
    assert np.all(joined(landed) == 9)
    with pytest.raises(ValueError, match="not registered"):
        source.describe(first, LEASE)
    target.close()
    source.close()


def test_deregistering_what_is_read_into_fences_the_readers(reader: Reader) -> None:
    reader.connection.read(Span(0, 100), reader.into).wait(soon())
    reader.transport.deregister(reader.into, soon())
    with pytest.raises(PeerLost):
        reader.connection.read(Span(0, 100), reader.into)


def test_untrusted_readers_refuse_to_serve() -> None:
    with pytest.raises(ConfigError, match="not trusted"):
        NixlTransport(SECRET, Gate(), untrusted_readers=True)
    NixlTransport(SECRET, untrusted_readers=True).close()


def test_what_only_reads_cannot_be_described_and_makes_no_agent() -> None:
    transport = nixl_backends.nixl(None)
    memory, _ = space(pattern(100))
    registration = transport.register(memory)
    assert registration.server is None
    with pytest.raises(ConfigError, match="serves nothing"):
        transport.describe(registration, LEASE)
    transport.close()


def test_an_idle_source_takes_no_core() -> None:
    source = nixl_backends.nixl(Gate())
    source.register(space(pattern(1000))[0])
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25
    source.close()


@pytest.fixture
def copier(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader that takes its source's shard for a large one."""
    monkeypatch.setattr(connection, "COPYING_SHARD", NBYTES)
    return reader


@needs_two_cores
def test_what_the_reader_copies_itself_comes_when_it_is_waited_for_and_in_order(copier: Reader) -> None:
    reader = copier
    reader.refill(0)
    content, half = pattern(NBYTES), NBYTES // 2
    assert reader.connection.depth == 1
    assert reader.connection.streams == connection.COPYING_STREAMS
    first = reader.connection.read(Span(0, half), reader.into)
    second = reader.connection.read(Span(half, NBYTES - half), reader.into)
    assert isinstance(first, CopyingRead)
    assert isinstance(second, CopyingRead)
    assert not reader.landed().any()
    first.wait_for(1000, soon(5))
    assert np.array_equal(reader.landed()[:1000], content[:1000])
    assert not reader.landed()[1000:].any()
    second.wait_for(1000, soon(20))
    assert first.finished
    assert np.array_equal(reader.landed()[: half + 1000], content[: half + 1000])
    assert not reader.landed()[half + 1000 :].any()
    second.wait(soon(20))
    assert second.finished
    assert np.array_equal(reader.landed(), content)


def test_a_wait_that_is_late_can_go_on(copier: Reader) -> None:
    reader = copier
    reader.refill(0)
    read = reader.connection.read(Span(0, NBYTES), reader.into)
    with pytest.raises(PeerStalled):
        read.wait(time.monotonic() - 1)
    assert not reader.landed().any()
    read.wait(soon(20))
    assert np.array_equal(reader.landed(), pattern(NBYTES))


@needs_two_cores
@pytest.mark.parametrize(
    ("count", "nbytes", "pays"), [(1000, 1 << 18, True), (1000, 1 << 17, False), (4, 1 << 24, False)]
)
def test_more_connections_pay_for_large_shards_of_large_tensors(
    reader: Reader, count: int, nbytes: int, pays: bool
) -> None:
    tensors = [Segment(at * nbytes, 4096 + at * nbytes, nbytes, "cpu") for at in range(count)]
    reader.connection._peer = replace(reader.connection._peer, memory=AddressSpace(tensors, [], None))
    assert (reader.connection.streams > 1) is pays
    assert (reader.connection.depth > 1) is not pays
