"""Pulls from peers that are still filling themselves: what is asked of whom, and when what arrived is told of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from target.test_pull import LEAVES, Load, Peer, Spoiled

from weightwire.errors import NotYet, PeerStalled, TransferError
from weightwire.manifest.leafset import indices, mask_of
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.target.peers import Bounds, NoDerivedError, NothingNewError, Session
from weightwire.target.pull import Pull
from weightwire.transport.base import Connection, Registration
from weightwire.types import Span

ALL = (1 << LEAVES) - 1


class Relay(Peer):
    """A peer that has what ``has`` offered, and refuses the rest as a relay does."""

    relaying = growing = True

    def __init__(self, load: Load, label: str, spoil: Callable[[Connection], Connection] | None = None) -> None:
        super().__init__(load.reader, load.weights, label, spoil)
        self.have = 0
        self.asked: list[Span] = []
        self.joined = threading.Event()
        self.closed = False
        self.over: Callable[[], bool] = lambda: False
        admit = self.gate.admit

        def admitted(lease: bytes, span: Span) -> Registration:
            self.asked.append(span)
            if leaves_in(span) & ~self.have:
                raise NotYet("not there yet", "")
            return admit(lease, span)

        self.gate.admit = admitted  # type: ignore[method-assign]

    def watch(self, failed: Callable[[TransferError], None], offers: Callable[[int], None]) -> None:
        super().watch(failed, offers)
        self.joined.set()

    def has(self, *leaves: int) -> None:
        self.have |= mask_of(leaves)
        assert self.joined.wait(10)
        self.offers(mask_of(leaves))

    def close(self) -> None:
        self.closed = True


def leaves_in(span: Span) -> int:
    return mask_of(range(span.offset // LEAF_BYTES, -(-span.end // LEAF_BYTES)))


@dataclass
class Running:
    """A pull in a thread of its own."""

    load: Load
    sessions: Iterator[Session | None]
    stall_s: float = 10.0
    told: int = 0
    error: TransferError | None = None
    watch: Callable[[int], None] = lambda _: None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        deadline = time.monotonic() + 50
        bounds = Bounds(deadline=deadline, stall_s=self.stall_s, growth_s=self.stall_s, fence_s=2.0, lanes=2, peers=3)
        into = {"inproc": self.load.registration}
        self.pull = Pull(self.load.manifest, into, self.load.schedule, bounds, verified=self._verified)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _verified(self, leaves: int) -> None:
        assert not self.told & leaves, "told twice"
        self.told |= leaves
        self.watch(leaves)

    def _run(self) -> None:
        try:
            self.pull.run(self.sessions)
        except TransferError as error:
            self.error = error

    def end(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()

    def until_told(self, count: int) -> None:
        until(lambda: self.told.bit_count() >= count)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def load() -> Load:
    torch.manual_seed(5)
    return Load(torch.randint(0, 256, (LEAVES * LEAF_BYTES - 77,), dtype=torch.uint8))


def test_a_relay_is_asked_for_what_it_has_and_for_nothing_else(load: Load) -> None:
    relay = Relay(load, "relay")
    running = Running(load, iter([relay]))
    relay.has(3, 4, 9)
    running.until_told(3)
    assert set(indices(running.told)) == {3, 4, 9}
    relay.has(*range(LEAVES))
    running.end()
    assert running.error is None
    assert load.exact
    assert running.told == ALL
    assert all(not leaves_in(span) & ~relay.have for span in relay.asked)
    assert running.pull.report.shares[0].relay
    assert running.pull.report.retries == 0


def test_a_peer_that_is_left_in_peace_ends_with_what_it_was_asked_for(load: Load) -> None:
    slow = threading.Event()
    whole = Peer(load.reader, load.weights, "whole", lambda inner: Slow(inner, slow))
    whole_closed: list[bool] = []
    whole.close = lambda: whole_closed.append(True)  # type: ignore[method-assign]
    relay = Relay(load, "relay")
    running = Running(load, iter([whole, relay]))
    relay.has(20, 21, 22)
    running.until_told(3)
    running.pull.peers[0].retire()
    slow.set()  # what the whole one was asked for arrives; it is asked for nothing more
    until(lambda: bool(whole_closed))
    before = running.told
    time.sleep(0.3)
    assert running.told == before
    assert before.bit_count() < LEAVES // 2
    relay.has(*range(LEAVES))
    running.end()
    assert load.exact
    shares = {share.peer: share for share in running.pull.report.shares}
    assert shares["relay"].nbytes > shares["whole"].nbytes > 0


def test_h27_a_relay_that_gets_nothing_new_is_replaced(load: Load) -> None:
    relay, whole = Relay(load, "relay"), Peer(load.reader, load.weights, "whole", None)
    running = Running(load, later(relay, whole), stall_s=0.8)
    relay.has(0, 1)
    running.until_told(2)
    relay.over = lambda: running.pull.report.shares[0].error is not None
    running.end()
    assert load.exact
    shares = {share.peer: share for share in running.pull.report.shares}
    assert isinstance(shares["relay"].error, NothingNewError)
    assert shares["relay"].nbytes == 2 * LEAF_BYTES
    assert shares["whole"].nbytes == load.weights.numel() - 2 * LEAF_BYTES


def later(first: Relay, second: Session) -> Iterator[Session | None]:
    """``first``, then nobody until it is over, then ``second``."""
    yield first
    while not first.over():
        yield None
    yield second


def test_h27_where_nobody_is_left_the_source_that_froze_is_named_and_not_the_relay_behind_it(load: Load) -> None:
    never = threading.Event()
    frozen = Peer(load.reader, load.weights, "frozen", lambda inner: Slow(inner, never))
    relay = Relay(load, "relay")
    running = Running(load, iter([frozen, relay]), stall_s=0.8)
    running.end()
    errors = {share.peer: share.error for share in running.pull.report.shares}
    assert isinstance(errors["relay"], NothingNewError)
    assert isinstance(errors["frozen"], PeerStalled)
    assert running.error is errors["frozen"]


def test_not_yet_costs_nothing_but_the_question(load: Load) -> None:
    relay = Relay(load, "relay")
    running = Running(load, iter([relay]))
    assert relay.joined.wait(10)
    relay.offers(mask_of([5]))  # it says so, and then does not have it
    until(lambda: bool(relay.asked))
    time.sleep(0.3)
    assert not running.told
    asked = len(relay.asked)
    time.sleep(0.2)
    assert len(relay.asked) == asked, "it is asked again and again"
    relay.has(*range(LEAVES))
    running.end()
    assert running.error is None
    assert load.exact
    assert running.pull.report.shares[0].error is None


def test_where_only_other_derived_tensors_are_left_to_be_had_it_says_so(load: Load) -> None:
    peer = Peer(load.reader, load.weights, "peer", None)
    peer.limit = ALL >> 2  # the last two leaves are its own
    running = Running(load, iter([peer, None, None, None]))
    running.end()
    assert isinstance(running.error, NoDerivedError)
    assert running.told == ALL >> 2


def test_h64_a_leaf_is_told_of_only_when_nobody_writes_there_any_more(load: Load) -> None:
    """One peer hangs with what it was asked for; another brings it, into a bounce buffer. It counts after the fence."""
    hung = threading.Event()
    slow = Peer(load.reader, load.weights, "slow", lambda inner: Slow(inner, hung))
    fenced_when_told: list[bool] = []

    def look(leaves: int) -> None:
        hanging = [read for line in slow.connections if isinstance(line, Slow) for read in line.open]
        fenced_when_told.extend(read.connection.fenced for read in hanging if leaves_in(read.span) & leaves)

    relay = Relay(load, "relay")
    running = Running(load, iter([slow, relay]), watch=look)
    relay.has(*range(LEAVES))
    running.end()
    assert load.exact
    assert fenced_when_told
    assert all(fenced_when_told)


def test_h38_a_leaf_is_told_of_only_when_it_has_its_digest(load: Load) -> None:
    """Whoever serves what was told of must find the right bytes there, at once."""
    wrong: list[int] = []

    def look(leaves: int) -> None:
        for leaf in indices(leaves):
            part = slice(leaf * LEAF_BYTES, (leaf + 1) * LEAF_BYTES)
            if not torch.equal(load.memory[part], load.weights[part]):
                wrong.append(leaf)

    running = Running(load, iter([load.peer("bad", at=4), load.peer("good")]), watch=look)
    running.end()
    assert load.exact
    assert running.pull.report.shares[0].bad_leaves
    assert wrong == []


class Slow(Spoiled):
    """A connection whose reads do not finish before ``go``."""

    def __init__(self, inner: Connection, go: threading.Event) -> None:
        super().__init__(inner, iter(()), 0, None)
        self.go = go
        self.open: list[SlowRead] = []

    def read(self, span: Span, into: Registration) -> SlowRead:
        made = SlowRead(self, span, into)
        self.open.append(made)
        return made


class SlowRead:
    def __init__(self, connection: Slow, span: Span, into: Registration) -> None:
        self.connection, self.span = connection, span
        self.inner = connection.inner.read(span, into)

    def wait(self, deadline: float) -> None:
        while not self.connection.go.wait(0.01):
            if self.connection.fenced:
                raise TransferError("fenced", "")
            if time.monotonic() > deadline:
                raise PeerStalled("slow", "")
        self.inner.wait(deadline)
        self.connection.open.remove(self)
