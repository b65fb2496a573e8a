"""Connections whose reads the waiting thread copies itself: in steps, over as many lanes as the first one says."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch
from target.test_pull import LEAVES, Load, Peer

from weightwire.errors import DigestMismatch
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.transport.base import Connection, Registration
from weightwire.transport.inproc import InprocTransport
from weightwire.types import Span

STEP_BYTES = 3 * LEAF_BYTES


@dataclass
class Copying:
    """An inproc connection that copies nothing before it is waited for, then so much."""

    inner: Connection
    streams: int
    both: threading.Barrier
    spoilt: int = -1
    step_bytes: int = STEP_BYTES
    read_bytes: int = 8 * LEAF_BYTES
    depth: int = 1
    steps: list[int] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.inner.path

    def read(self, span: Span, into: Registration) -> CopyingRead:
        if not self.steps:
            self.both.wait(10.0)  # no lane takes everything before the others are there
        return CopyingRead(self, span, into)

    def fence(self, deadline: float) -> None:
        self.inner.fence(deadline)


@dataclass
class CopyingRead:
    connection: Copying
    span: Span
    into: Registration
    copied: int = 0

    def wait(self, deadline: float) -> None:
        self.wait_for(self.span.nbytes, deadline)

    def wait_for(self, nbytes: int, deadline: float) -> None:
        step = Span(self.span.offset + self.copied, nbytes - self.copied)
        self.connection.inner.read(step, self.into).wait(deadline)
        self.connection.steps.append(step.nbytes)
        self.copied = nbytes
        if step.offset <= self.connection.spoilt < step.end:
            tensor = self.into.memory.owners
            assert isinstance(tensor, torch.Tensor)
            tensor[self.connection.spoilt] ^= 1


class CopyingPeer(Peer):
    lanes = 1

    def __init__(self, load: Load, streams: int, lanes: int, spoilt: int = -1) -> None:
        both = threading.Barrier(lanes)
        super().__init__(load.reader, load.weights, "a", lambda inner: Copying(inner, streams, both, spoilt))

    @property
    def steps(self) -> list[list[int]]:
        return [each.steps for each in self.connections if isinstance(each, Copying)]


@pytest.fixture
def load() -> Load:
    generator = torch.Generator().manual_seed(7)
    weights = torch.randint(0, 256, (LEAVES * LEAF_BYTES - 1234,), dtype=torch.uint8, generator=generator)
    assert isinstance(Load(weights).reader, InprocTransport)
    return Load(weights)


@pytest.mark.parametrize(("streams", "bound", "lanes"), [(0, 4, 1), (1, 4, 1), (2, 4, 2), (4, 2, 2)])
def test_there_are_as_many_lanes_as_the_first_connection_says(load: Load, streams: int, bound: int, lanes: int) -> None:
    peer = CopyingPeer(load, streams, lanes)
    pull = load.run(peer, lanes=bound)
    assert load.exact
    assert len(peer.connections) == lanes
    assert all(peer.steps)
    assert pull.report.shares[0].nbytes == load.weights.numel()


def test_a_read_is_digested_step_by_step(load: Load) -> None:
    peer = CopyingPeer(load, 1, 1)
    load.run(peer)
    assert load.exact
    (steps,) = peer.steps
    assert max(steps) == STEP_BYTES
    assert sum(steps) == load.weights.numel()


def test_h31_a_flipped_bit_in_the_middle_of_a_step_drops_the_peer(load: Load) -> None:
    with pytest.raises(DigestMismatch, match="leaf 5 from a"):
        load.run(CopyingPeer(load, 1, 1, spoilt=5 * LEAF_BYTES + 3))
    assert not load.schedule.finished
