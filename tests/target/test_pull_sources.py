"""One load from three sources in processes of their own over ``tcp``, one of which is slow, killed, frozen or wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from transport import backends
from transport.peers import LEASE, MIB, Bytes, SourceProcess, joined, pattern, space

from weightwire.errors import DigestMismatch, PeerLost, TransferError
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.records import Entry, Layout, Manifest
from weightwire.target.peers import Bounds, PeerShare, PullReport
from weightwire.target.pull import Pull
from weightwire.target.schedule import Schedule
from weightwire.target.shares import EVERYTHING
from weightwire.transport.base import Connection
from weightwire.transport.faults import Corrupt, Delay, Fault, FaultPlan, FaultyTransport, Hang
from weightwire.types import TensorClass

NBYTES = 64 * MIB - 4321
STALL_S = 20.0
PACE = Delay(0.03)
"""A read of a sound source, so that there is a middle to be killed in: about 90 MB/s of three sources."""


class Source:
    """A session with a source process, whose reads suffer ``faults`` by their number on their connection."""

    transport = "tcp"
    lanes = 2
    rate = 0.0
    relaying = False
    growing = False
    limit = (1 << NBYTES // MIB + 1) - 1
    share = EVERYTHING

    def __init__(self, process: SourceProcess, label: str, *, usual: Fault = PACE, **faults: Fault) -> None:
        self.process = process
        self.label = label
        script = {(lane, int(read[1:])): fault for lane in range(2) for read, fault in faults.items()}
        self.reader = FaultyTransport(backends.tcp(None), FaultPlan(script=script, rates=((1.0, usual),)))

    def connect(self, deadline: float) -> Connection:
        return self.reader.connect(self.process.endpoint, LEASE, deadline)

    def watch(self, failed: Callable[[TransferError], None], offers: Callable[[int], None]) -> None:
        """Nobody tells us anything."""

    def close(self) -> None:
        """It goes on."""


class Load:
    """A target with zeroed memory in five allocations."""

    def __init__(self, content: Bytes) -> None:
        self.content = content
        memory, self.parts = space(np.zeros(NBYTES, dtype=np.uint8), 5)
        entry = Entry(name="w", dtype="uint8", shape=(NBYTES,), order=(0,), kind=TensorClass.WEIGHT, nbytes=NBYTES)
        layout = Layout(entries=(entry,))
        self.manifest = Manifest(layout=layout, digests=digest_leaves(space(content)[0], layout.leaves))
        self.into = backends.tcp(None).register(memory)
        self.schedule = Schedule(layout.leaves, range(len(layout.leaves)), MIB)
        self.done = 0

    def run(self, *sources: Source, at: float = 2.0, then: Callable[[], None] = lambda: None) -> PullReport:
        """``then`` is called when the part ``at`` of all bytes is verified."""

        def arrived(nbytes: int) -> None:
            before, self.done = self.done, self.done + nbytes
            if before < at * NBYTES <= self.done:
                then()

        bounds = Bounds(deadline=time.monotonic() + 40, stall_s=STALL_S, fence_s=5.0)
        pull = Pull(self.manifest, {"tcp": self.into}, self.schedule, bounds, arrived)
        try:
            pull.run(iter(sources))
        finally:
            for source in sources:
                source.reader.close()
        return pull.report

    @property
    def exact(self) -> bool:
        return np.array_equal(joined(self.parts), self.content)


def shares_of(report: PullReport) -> dict[str, PeerShare]:
    assert sum(share.nbytes for share in report.shares) == NBYTES
    return {share.peer: share for share in report.shares}


@pytest.fixture(scope="module")
def content() -> Bytes:
    return pattern(NBYTES)


@pytest.fixture(scope="module")
def sound() -> Iterator[list[SourceProcess]]:
    with (
        SourceProcess("transport.backends:tcp", NBYTES, 3) as first,
        SourceProcess("transport.backends:tcp", NBYTES) as second,
    ):
        yield [first, second]


@pytest.fixture
def victim() -> Iterator[SourceProcess]:
    with SourceProcess("transport.backends:tcp", NBYTES, 2) as process:
        yield process


@pytest.fixture
def load(content: Bytes) -> Load:
    return Load(content)


def test_three_sound_sources_share_the_work_and_nothing_is_asked_for_twice(
    load: Load, sound: list[SourceProcess]
) -> None:
    report = load.run(Source(sound[0], "a"), Source(sound[1], "b"), Source(sound[0], "c"))
    assert load.exact
    assert all(share.nbytes > NBYTES // 6 for share in shares_of(report).values())
    assert report.retries == 0
    assert report.duplicated == 0


def test_a_slow_source_does_not_hold_up_the_end(load: Load, sound: list[SourceProcess], victim: SourceProcess) -> None:
    slow = Source(victim, "slow", usual=Delay(6.0))
    report = load.run(Source(sound[0], "a"), Source(sound[1], "b"), slow)
    assert load.exact
    assert report.seconds < 5.0
    share = shares_of(report)["slow"]
    assert share.nbytes <= 2 * MIB
    assert share.outrun
    assert share.error is None
    assert 0 < report.duplicated <= 4 * MIB


def test_h26_a_source_killed_in_mid_read_costs_only_what_it_still_owed(
    load: Load, sound: list[SourceProcess], victim: SourceProcess
) -> None:
    report = load.run(Source(sound[0], "a"), Source(sound[1], "b"), Source(victim, "killed"), at=0.4, then=victim.kill)
    assert load.exact
    share = shares_of(report)["killed"]
    assert isinstance(share.error, PeerLost)
    assert share.nbytes > NBYTES // 20, "what it had delivered stays"
    assert report.retries <= 4


def test_h27_h32_a_frozen_source_is_not_waited_for_and_what_it_sends_later_lands_nowhere(
    load: Load, sound: list[SourceProcess], victim: SourceProcess
) -> None:
    report = load.run(
        Source(sound[0], "a"), Source(sound[1], "b"), Source(victim, "frozen"), at=0.4, then=victim.freeze
    )
    assert load.exact
    assert report.seconds < STALL_S / 2
    share = shares_of(report)["frozen"]
    assert share.nbytes
    assert share.outrun
    assert report.duplicated >= MIB
    for part in load.parts:
        part[:] = 0
    victim.resume()
    time.sleep(0.3)
    assert not any(part.any() for part in load.parts)


def test_h31_a_source_with_a_flipped_bit_is_dropped_and_the_leaf_comes_from_another(
    load: Load, sound: list[SourceProcess], victim: SourceProcess
) -> None:
    report = load.run(Source(sound[0], "a"), Source(sound[1], "b"), Source(victim, "wrong", r3=Corrupt()))
    assert load.exact
    shares = shares_of(report)
    assert isinstance(shares["wrong"].error, DigestMismatch)
    assert shares["wrong"].bad_leaves >= 1
    assert shares["a"].error is None
    assert shares["b"].error is None


def test_h31_a_bounce_buffer_is_verified_too(load: Load, sound: list[SourceProcess], victim: SourceProcess) -> None:
    """The one that repeats is wrong: it is dropped, and the slow one's own answer counts."""
    slow = Source(victim, "slow", usual=Delay(2.0))
    bad = {f"r{at}": Corrupt() for at in range(31, 60)}
    report = load.run(slow, Source(sound[0], "wrong at the end", **bad))
    assert load.exact
    shares = shares_of(report)
    assert isinstance(shares["wrong at the end"].error, DigestMismatch)
    assert shares["slow"].nbytes


def test_h64_a_read_that_hangs_is_fenced_before_its_place_is_filled(
    load: Load, sound: list[SourceProcess], victim: SourceProcess
) -> None:
    hang = Hang()
    hanging = Source(victim, "hanging", r2=hang)
    report = load.run(Source(sound[0], "a"), hanging)
    assert load.exact
    assert shares_of(report)["hanging"].outrun
    for part in load.parts:
        part[:] = 0
    hang.release.set()
    time.sleep(0.2)
    assert not any(part.any() for part in load.parts)


def test_when_the_last_source_dies_the_load_ends_in_its_error(
    load: Load, victim: SourceProcess, sound: list[SourceProcess]
) -> None:
    wrong = Source(sound[0], "wrong", r2=Corrupt())
    with pytest.raises(TransferError):
        load.run(wrong, Source(victim, "killed"), at=0.3, then=victim.kill)
    assert not load.schedule.finished
