from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weightwire.errors import PublishError
from weightwire.metadata.lifecycle import (
    Action,
    AdmitReaders,
    Announce,
    CutReaders,
    Digested,
    Event,
    KeepBroke,
    KeepHeld,
    LeaseLost,
    Life,
    MoveGeneration,
    Offer,
    Pause,
    Quiet,
    ReaderClosed,
    ReaderOpened,
    RefuseReaders,
    RelayBegan,
    Resume,
    Retract,
    SelfCheckFailed,
    Tick,
    Withdraw,
    step,
)
from weightwire.wire.messages import PublicationState as S


def run(*events: Event, life: Life | None = None) -> tuple[Life, list[Action]]:
    now = life or Life()
    actions: list[Action] = []
    for event in events:
        now, more = step(now, event)
        actions.extend(more)
    return now, actions


def kinds(actions: list[Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_from_disk_to_ready() -> None:
    life, actions = run(Digested(1), Offer(2))
    assert (life.state, life.generation) == (S.READY, 1)
    assert [a for a in actions if isinstance(a, Announce)] == [Announce(S.HELD, 1, 2), Announce(S.READY, 1, 3)]
    assert isinstance(actions[1], AdmitReaders)


def test_a_relay_is_readable_while_it_fills() -> None:
    life, actions = run(RelayBegan(1))
    assert life.admits
    assert kinds(actions) == ["AdmitReaders", "Announce"]
    complete, actions = run(Digested(2), life=life)
    assert (complete.state, complete.admits, actions) == (S.RELAYING, True, []), "the engine has not said a word"
    assert run(Offer(3), life=complete)[0].state is S.READY


def test_pause_drains_first_and_moves_the_generation_last() -> None:
    life, actions = run(Digested(1), Offer(2), ReaderOpened(3, b"r", 100), Pause(4, 10))
    assert kinds(actions)[-2:] == ["RefuseReaders", "Announce"]
    assert (life.state, life.generation, life.quiet) == (S.PAUSED, 1, False)
    life, actions = run(ReaderClosed(5, b"r"), life=life)
    assert kinds(actions) == ["MoveGeneration", "Announce", "Quiet"]
    assert (life.generation, life.quiet) == (2, True)
    life, actions = run(Resume(6), life=life)
    assert kinds(actions) == ["AdmitReaders", "Announce"]
    assert (life.state, life.generation) == (S.READY, 2)


def test_withdraw_moves_the_generation_first_and_tells_the_server_after_it() -> None:
    life, actions = run(Digested(1), Offer(2), ReaderOpened(3, b"r", 100))
    life, actions = run(Withdraw(4, 10), life=life)
    assert actions == [RefuseReaders(), MoveGeneration(2), Retract(2, life.sequence)]
    life, actions = run(Tick(13.9), life=life)
    assert actions == []
    life, actions = run(Tick(14), life=life)
    assert actions == [CutReaders((b"r",)), Quiet()]
    assert not life.published
    assert run(LeaseLost(15), Withdraw(16, 1), SelfCheckFailed(17, 1), life=life)[1] == []


def test_h33_what_was_lost_is_announced_as_it_is_now_and_only_while_it_is_published() -> None:
    life, _ = run(Digested(1), Offer(2), Pause(3, 0))
    assert run(LeaseLost(4), life=life)[1] == [Announce(S.PAUSED, 2, life.sequence)]
    gone, _ = run(Withdraw(5, 0), life=life)
    assert run(LeaseLost(6), life=gone)[1] == []


def test_a_shard_that_digests_wrongly_is_withdrawn() -> None:
    life, actions = run(Digested(1), Offer(2), SelfCheckFailed(3, 0))
    assert life.state is S.WITHDRAWN
    assert kinds(actions)[-4:] == ["RefuseReaders", "MoveGeneration", "Retract", "Quiet"]


def test_a_raw_hold_ends_after_the_last_reader() -> None:
    life, _ = run(Digested(1), Offer(2), life=Life(raw_hold_s=5))
    life, _ = run(ReaderOpened(4, b"r", 100), Tick(50), life=life)
    assert life.state is S.READY
    life, _ = run(ReaderClosed(60, b"r"), Tick(64.9), life=life)
    assert life.state is S.READY
    life, actions = run(Tick(65), life=life)
    assert life.state is S.WITHDRAWN
    assert kinds(actions)[-1] == "Quiet"


def test_a_reader_that_shows_no_life_is_cut() -> None:
    life, _ = run(Digested(1), Offer(2), ReaderOpened(3, b"r", 10), ReaderOpened(8, b"r", 20), Tick(15))
    assert b"r" in life.readers
    assert run(Tick(20), life=life)[1] == [CutReaders((b"r",))]


def test_a_relay_that_is_paused_obeys_and_comes_back_as_what_it_is_then() -> None:
    life, _ = run(RelayBegan(1), Pause(2, 0))
    assert run(Resume(3), life=life)[0].state is S.RELAYING
    assert run(Digested(3), Resume(4), life=life)[0].state is S.RELAYING
    assert run(Digested(3), Offer(4), Resume(5), life=life)[0].state is S.READY


@pytest.mark.parametrize(
    "events",
    [
        (Offer(1),),
        (Withdraw(1, 0), Offer(2)),
        (Withdraw(1, 0), Resume(2)),
        (Digested(1), RelayBegan(2)),
        (RelayBegan(1), Offer(2)),
        (ReaderOpened(1, b"r", 2),),
        (Digested(1), Offer(2), ReaderOpened(3, b"r", 99), Pause(4, 50), Resume(5)),
    ],
)
def test_mistakes_of_the_caller_raise(events: tuple[Event, ...]) -> None:
    with pytest.raises(PublishError):
        run(*events)


class AnyLife(RuleBasedStateMachine):
    """Drives a life with any events, and carries the actions out the way a source does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.life = Life()
        self.admitting = False
        self.served = self.life.generation
        self.readers: dict[bytes, int] = {}
        self.announced: list[tuple[int, int]] = []
        self.retracted = False
        self.number = 0

    @initialize(hold=st.none() | st.just(20.0))
    def hold(self, hold: float | None) -> None:
        self.life = Life(raw_hold_s=hold)

    def feed(self, event: Any) -> None:
        before = self.life
        try:
            self.life, actions = step(self.life, event)
        except PublishError:
            assert self.life is before
            return
        for action in actions:
            self.perform(action)

    def perform(self, action: Action) -> None:
        assert not (self.retracted and isinstance(action, (Announce, AdmitReaders, Retract)))
        match action:
            case RefuseReaders():
                self.admitting = False
            case AdmitReaders():
                self.admitting = True
            case MoveGeneration(generation):
                assert generation == self.served + 1
                assert not self.admitting
                self.served = generation
            case Announce(state, generation, sequence):
                assert state is not S.WITHDRAWN
                self.announced.append((generation, sequence))
            case Retract(generation, sequence):
                assert generation == self.served  # moved here before the server is told
                assert all((generation, sequence) > known for known in self.announced)
                self.retracted = True
            case CutReaders(leases):
                for lease in leases:
                    self.readers.pop(lease)
            case Quiet():
                assert not self.admitting
                assert not self.readers  # the bytes may change from here on
                assert all(self.served > generation for generation in self.readers.values())

    @rule()
    def relay(self) -> None:
        self.feed(RelayBegan(self.now))

    @rule()
    def digested(self) -> None:
        self.feed(Digested(self.now))

    @rule()
    def offer(self) -> None:
        self.feed(Offer(self.now))

    @rule(drain=st.sampled_from([0.0, 1.0, 5.0]))
    def pause(self, drain: float) -> None:
        self.feed(Pause(self.now, drain))

    @rule()
    def resume(self) -> None:
        self.feed(Resume(self.now))

    @precondition(lambda self: self.now > 3)
    @rule(drain=st.sampled_from([0.0, 5.0]), failed=st.booleans())
    def end(self, drain: float, failed: bool) -> None:
        self.feed(SelfCheckFailed(self.now, drain) if failed else Withdraw(self.now, drain))

    @precondition(lambda self: self.life.admits)
    @rule(ttl=st.sampled_from([1.0, 30.0]))
    def open(self, ttl: float) -> None:
        assert self.admitting
        self.number += 1
        lease = str(self.number).encode()
        self.readers[lease] = self.served
        self.feed(ReaderOpened(self.now, lease, self.now + ttl))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.readers)))
        del self.readers[lease]
        self.feed(ReaderClosed(self.now, lease))

    @rule(kind=st.sampled_from([LeaseLost, KeepBroke, KeepHeld]))
    def server(self, kind: type[LeaseLost | KeepBroke | KeepHeld]) -> None:
        before = len(self.announced)
        self.feed(kind(self.now))
        if kind is LeaseLost and self.life.published:
            assert self.announced[before:] == [(self.life.generation, self.life.sequence)]

    @rule(seconds=st.sampled_from([0.5, 2.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick(self.now))
        assert all(until > self.now for until in self.life.readers.values())
        assert self.life.drain_until is None or self.life.drain_until > self.now  # a drain has a bound

    @invariant()
    def consistent(self) -> None:
        assert self.served == self.life.generation
        assert self.admitting == self.life.admits
        assert set(self.readers) == set(self.life.readers)
        assert self.announced == sorted(self.announced)
        assert self.retracted == (not self.life.published)
        assert not (self.life.quiet and self.life.readers)


AnyLife.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyLife = AnyLife.TestCase
