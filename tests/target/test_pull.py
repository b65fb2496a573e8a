from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from weightwire.errors import (
    DigestMismatch,
    FenceTimeout,
    GenerationMoved,
    PeerLost,
    PeerStalled,
    TransferError,
)
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.records import Entry, Layout, Manifest
from weightwire.target.peers import Bounds
from weightwire.target.pull import Pull
from weightwire.target.schedule import Schedule
from weightwire.target.shares import EVERYTHING
from weightwire.transport.base import Connection, Read, Registration
from weightwire.transport.inproc import InprocTransport
from weightwire.types import Span, TensorClass

LEAVES = 24
LEASE = b"l" * 16


def space(tensor: torch.Tensor) -> AddressSpace:
    region = Region(tensor.data_ptr(), tensor.numel(), "cpu")
    return AddressSpace([Segment(0, tensor.data_ptr(), tensor.numel(), "cpu")], [region], tensor)


def manifest_of(tensor: torch.Tensor) -> Manifest:
    entry = Entry(
        name="w", dtype="uint8", shape=(tensor.numel(),), order=(0,), kind=TensorClass.WEIGHT, nbytes=tensor.numel()
    )
    layout = Layout(entries=(entry,))
    return Manifest(layout=layout, digests=digest_leaves(space(tensor), layout.leaves))


@dataclass
class Gate:
    registration: Registration | None = None

    def admit(self, lease: bytes, span: Span) -> Registration:
        assert lease == LEASE
        assert span.nbytes
        if self.registration is None:
            raise GenerationMoved("over", "")
        return self.registration


class Peer:
    """A serving inproc transport as a session; ``spoil`` may wrap every connection."""

    transport = "inproc"
    lanes = 2
    rate = 0.0
    relaying = False
    growing = False
    limit = (1 << LEAVES) - 1
    share = EVERYTHING

    def __init__(
        self, reader: InprocTransport, held: torch.Tensor, label: str, spoil: Callable[[Connection], Connection] | None
    ) -> None:
        self.label = label
        self.gate = Gate()
        self.serving = InprocTransport(self.gate)
        self.gate.registration = self.serving.register(space(held))
        self.reader = reader
        self.spoil = spoil
        self.connections: list[Connection] = []

    def connect(self, deadline: float) -> Connection:
        assert self.gate.registration is not None
        endpoint = self.serving.describe(self.gate.registration, LEASE)
        connection: Connection = self.reader.connect(endpoint, LEASE, deadline)
        wrapped = self.spoil(connection) if self.spoil else connection
        self.connections.append(wrapped)
        return wrapped

    def watch(self, failed: Callable[[TransferError], None], offers: Callable[[int], None]) -> None:
        self.failed = failed
        self.offers = offers

    def close(self) -> None:
        """It goes on."""


class Spoiled:
    """A connection whose n-th read goes wrong, counted over all lanes of the peer."""

    def __init__(self, inner: Connection, counter: Iterator[int], at: int, error: TransferError | None) -> None:
        self.inner, self.counter, self.at, self.error = inner, counter, at, error
        self.fenced = False

    @property
    def path(self) -> str:
        return self.inner.path

    @property
    def depth(self) -> int:
        return self.inner.depth

    def read(self, span: Span, into: Registration) -> Read:
        return SpoiledRead(self, self.inner.read(span, into), span, into, next(self.counter) >= self.at)

    def fence(self, deadline: float) -> None:
        if isinstance(self.error, FenceTimeout):
            raise self.error
        self.fenced = True
        self.inner.fence(deadline)


@dataclass
class SpoiledRead:
    connection: Spoiled
    inner: Read
    span: Span
    into: Registration
    spoilt: bool

    def wait(self, deadline: float) -> None:
        self.inner.wait(deadline)
        if not self.spoilt:
            return
        if self.connection.error is None:
            tensor = self.into.memory.owners
            assert isinstance(tensor, torch.Tensor)
            tensor[self.span.offset + self.span.nbytes // 2] ^= 0x80
        else:
            fails = self.connection.error
            raise PeerStalled("stalled", "") if isinstance(fails, FenceTimeout) else fails


@pytest.fixture
def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (LEAVES * LEAF_BYTES - 1234,), dtype=torch.uint8, generator=generator)


class Load:
    """A target with poisoned memory, and what a pull of ``weights`` did to it."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights
        self.memory = torch.full_like(weights, 0x7F)
        self.reader = InprocTransport()
        self.manifest = manifest_of(weights)
        leaves = self.manifest.layout.leaves
        self.schedule = Schedule(leaves, range(len(leaves)), 2 * LEAF_BYTES)
        self.arrived: list[int] = []
        self.registration = self.reader.register(space(self.memory))

    def peer(
        self, label: str, at: int | None = None, error: TransferError | None = None, held: torch.Tensor | None = None
    ) -> Peer:
        counter = itertools.count()
        spoil = None if at is None else lambda inner: Spoiled(inner, counter, at, error)
        return Peer(self.reader, self.weights if held is None else held, label, spoil)

    def run(self, *peers: Peer, at_a_time: int = 1, lanes: int = 2) -> Pull:
        bounds = Bounds(deadline=time.monotonic() + 30, stall_s=1.0, fence_s=2.0, lanes=lanes, peers=at_a_time)
        pull = Pull(self.manifest, {"inproc": self.registration}, self.schedule, bounds, self.arrived.append)
        self.pull = pull
        pull.run(iter(peers))
        return pull

    @property
    def exact(self) -> bool:
        return torch.equal(self.memory, self.weights)


@pytest.fixture
def load(weights: torch.Tensor) -> Load:
    return Load(weights)


def test_one_peer_delivers_every_byte(load: Load) -> None:
    pull = load.run(load.peer("a"))
    assert load.exact
    assert sum(load.arrived) == load.weights.numel() == pull.report.shares[0].nbytes
    assert pull.report.retries == 0


def test_several_peers_share_the_work(load: Load) -> None:
    slow = [load.peer(name) for name in "ab"]
    pull = load.run(*slow, at_a_time=2, lanes=1)
    assert load.exact
    assert sum(share.nbytes for share in pull.report.shares) == load.weights.numel()


class Forgetful(Peer):
    """Keeps nobody that watches it."""

    def watch(self, failed: Callable[[TransferError], None], offers: Callable[[int], None]) -> None:
        del failed, offers


def test_h10_memory_that_was_received_into_is_let_go_at_once_not_by_the_collector_of_cycles(
    weights: torch.Tensor,
) -> None:
    """A receiver goes on to transform its weights: what these replace must not stay beside them."""
    load = Load(weights)
    memory, peers = weakref.ref(load.memory), [Forgetful(load.reader, weights, name, None) for name in "ab"]
    gc.disable()
    try:
        load.run(*peers, at_a_time=2)
        assert load.exact
        load.reader.deregister(load.registration, time.monotonic() + 5)
        for connection in (each for peer in peers for each in peer.connections):
            connection.fence(time.monotonic() + 5)
        del load, connection
        peers.clear()
        assert memory() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [PeerLost("lost", ""), PeerStalled("stalled", ""), GenerationMoved("moved", "")])
def test_h26_another_source_takes_over_only_what_is_missing(load: Load, error: TransferError) -> None:
    first, second = load.peer("a", at=6, error=error), load.peer("b")
    pull = load.run(first, second)
    assert load.exact
    shares = {share.peer: share for share in pull.report.shares}
    assert 0 < shares["a"].nbytes < load.weights.numel()
    assert shares["a"].nbytes + shares["b"].nbytes == load.weights.numel()
    assert shares["a"].error is error
    assert all(isinstance(each, Spoiled) and each.fenced for each in first.connections)


def test_h31_a_flipped_bit_drops_the_peer_and_the_leaf_comes_from_another(load: Load) -> None:
    pull = load.run(load.peer("a", at=4), load.peer("b"))
    assert load.exact
    shares = {share.peer: share for share in pull.report.shares}
    assert shares["a"].bad_leaves >= 1
    assert isinstance(shares["a"].error, DigestMismatch)
    assert shares["b"].bad_leaves == 0


def test_h36_success_means_every_digest_held(load: Load) -> None:
    other = load.weights.clone()
    other[5 * LEAF_BYTES + 17] ^= 1
    with pytest.raises(DigestMismatch):
        load.run(load.peer("a", held=other))
    assert not load.schedule.finished


def test_without_a_peer_the_reason_is_given(load: Load) -> None:
    with pytest.raises(TransferError, match="no peer is left"):
        load.run()


def test_h32_memory_that_may_still_be_written_is_condemned(load: Load) -> None:
    with pytest.raises(FenceTimeout, match="peer a could not be stopped"):
        load.run(load.peer("a", at=2, error=FenceTimeout("no", "")), load.peer("b"))
    assert not load.schedule.finished  # what the first peer may still write is nobody else's


def test_the_deadline_of_the_load_holds(weights: torch.Tensor) -> None:
    load = Load(weights)
    bounds = Bounds(deadline=time.monotonic() - 1, peers=1)
    pull = Pull(load.manifest, {"inproc": load.registration}, load.schedule, bounds)
    with pytest.raises(TransferError):
        pull.run(iter([load.peer("a")]))
