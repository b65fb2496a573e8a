"""Whom a pull reads from next, with the metadata server, the sources and the clock played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from wire_samples import record

from weightwire.errors import AuthError, MetadataUnreachable, PeerLost, SourceBusy, TransferError
from weightwire.target import supply as module
from weightwire.target.peers import NothingNewError, PeerShare
from weightwire.target.session import PeerSession
from weightwire.target.shares import EVERYTHING, Share
from weightwire.target.supply import BUSY_S, FIRST_ASK_S, KNOWN_S, LAST_ASK_S, LAST_SEATED_ASK_S, SEATED_ASK_S, Supply
from weightwire.wire.messages import Candidate, PublicationState

CONTENT = "c" * 64
SOON = FIRST_ASK_S * 1.01
"""When it may ask again: a moment beyond, for the clock's rounding."""
S = PublicationState


def other(name: str, state: PublicationState = S.RELAYING, **fields: Any) -> Candidate:
    """One without a seat."""
    told = record(incarnation=name, state=state, content_id=CONTENT, generation=1, **fields)
    return Candidate(record=told, reason="")


def source(name: str) -> Candidate:
    return other(name, S.READY)


def seat(name: str, part: int = 0, parts: int = 1, state: PublicationState = S.RELAYING) -> Candidate:
    return Candidate(record=other(name, state).record, reason="", seated=True, part=part, parts=parts)


def backup(name: str) -> Candidate:
    return seat(name, parts=0)


@dataclass
class Peer:
    """What the pull makes of a session."""

    share: PeerShare
    running: bool = True
    retired: bool = False
    useful: bool = True
    complete: bool = False

    def retire(self) -> None:
        self.retired = True

    def fail(self, error: TransferError) -> None:
        self.running, self.share.error = False, error


@dataclass
class World:
    """A server whose answer is ``listed``, sources that refuse with what ``refuses`` says, and a pull."""

    listed: tuple[Candidate, ...] = ()
    refuses: dict[str, TransferError | AuthError] = field(default_factory=dict)
    now: float = 100.0
    asked: list[float] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)
    answer: Callable[[], tuple[Candidate, ...]] | None = None

    def supply(self, *known: Candidate, seated: bool = True, asks: bool = True, content_id: str = CONTENT) -> Supply:
        made = Supply(
            known,
            self._connect,
            self._find if asks else None,
            seated=seated,
            content_id=content_id,
            unusable=lambda candidate, _: self.unusable.append(candidate.record.incarnation),
            clock=lambda: self.now,
        )
        made.peers = self.peers
        return made

    def _find(self) -> tuple[Candidate, ...]:
        self.asked.append(self.now)
        return self.answer() if self.answer is not None else self.listed

    def _connect(self, candidate: Candidate) -> PeerSession:
        name = candidate.record.incarnation
        self.tried.append(name)
        if name in self.refuses:
            raise self.refuses[name]
        relaying = candidate.record.state is S.RELAYING and not candidate.record.reads_disk
        share = Share(candidate.part, candidate.parts) if candidate.seated else EVERYTHING
        return cast("PeerSession", SimpleNamespace(candidate=candidate, relaying=relaying, share=share))

    def open(self, supply: Supply) -> str | None:
        """The next one, whom the pull joins; ``None`` for nobody now."""
        session = next(supply)
        if session is None:
            return None
        share = PeerShare(peer=session.candidate.record.incarnation, relay=session.relaying)
        self.peers.append(Peer(share, complete=not session.relaying))
        return self.peers[-1].share.peer

    def open_all(self, supply: Supply) -> list[str]:
        """Until nobody is to be read besides."""
        found: list[str] = []
        while (name := self.open(supply)) is not None:
            found.append(name)
            assert len(found) < 20
        return found

    def reads(self) -> list[str]:
        return [each.share.peer for each in self.peers if each.running and not each.retired]

    def peer(self, name: str) -> Peer:
        """The last one of that name."""
        return next(each for each in reversed(self.peers) if each.share.peer == name)

    def later(self, supply: Supply, seconds: float) -> list[str]:
        self.now += seconds
        return self.open_all(supply)


LOST = PeerLost("gone", "")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    def sleep(seconds: float) -> None:
        made.now += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    return made


# ---- seats


def test_the_first_seats_are_awaited_until_the_server_knows_us(world: World) -> None:
    answers = iter([(source("s"), other("a"))] * 3)
    world.answer = lambda: next(answers, (seat("a"), backup("b"), source("s")))
    supply = world.supply(source("s"), other("a"))
    assert world.open(supply) == "a"
    assert world.tried == ["a"], "nobody else was bothered before the seats were known"
    assert len(world.asked) == 4
    assert world.now - 100.0 < KNOWN_S


def test_h25_whoever_gets_no_seat_reads_without_one_after_a_while(world: World) -> None:
    world.listed = (source("s"),)
    supply = world.supply(source("s"))
    assert world.open(supply) == "s"
    assert world.now - 100.0 == pytest.approx(KNOWN_S, abs=0.1)


def test_one_that_passes_nothing_on_waits_for_no_seat(world: World) -> None:
    world.listed = (other("a"), source("s"))
    supply = world.supply(other("a"), source("s"), seated=False)
    assert world.open_all(supply) == ["a"], "one relay, and the source is left in peace"
    assert world.now == 100.0


def test_seats_are_opened_together_and_nobody_else(world: World) -> None:
    world.listed = (seat("a"), backup("b"), source("s"))
    supply = world.supply(source("s"))
    assert world.open_all(supply) == ["a", "b"]
    assert world.reads() == ["a", "b"]


def test_the_head_of_a_chain_reads_from_all_its_sources(world: World) -> None:
    seats = [seat(name, state=S.READY) for name in ("s", "t", "u")]
    world.listed = (*seats, other("late"))
    supply = world.supply(source("s"))
    assert world.open_all(supply) == ["s", "t", "u"]


def test_both_trees_are_read_and_each_for_its_part(world: World) -> None:
    world.listed = (seat("a", 0, 2), seat("b", 1, 2), source("s"))
    supply = world.supply(source("s"))
    assert world.open_all(supply) == ["a", "b"]
    assert [session.share for session in supply.opened] == [Share(0, 2), Share(1, 2)]


# ---- places that shift


def test_in_a_chain_that_closes_up_the_new_seat_is_opened_and_the_old_one_left_in_peace(world: World) -> None:
    world.listed = (seat("a"), backup("b"))
    supply = world.supply(source("s"))
    world.open_all(supply)
    world.listed = (seat("n"), backup("a"), source("s"))
    assert world.later(supply, SEATED_ASK_S) == ["n", "a"]
    assert sorted(world.reads()) == ["a", "n"]
    assert [each.share.peer for each in world.peers if each.retired] == ["a", "b"]
    assert supply.opened[-1].share == Share(0, 0), "the old parent is a backup now, under a lease of its own"


def test_the_old_seat_is_kept_until_the_new_one_is_open(world: World) -> None:
    world.listed = (seat("a"), backup("b"))
    supply = world.supply(source("s"))
    world.open_all(supply)
    world.listed, world.refuses = (seat("n"), backup("b")), {"n": LOST}
    world.later(supply, SEATED_ASK_S)
    assert "n" in world.tried
    assert world.reads() == ["a", "b"]


def test_a_complete_peer_is_kept(world: World) -> None:
    world.listed = (seat("a"), backup("b"))
    supply = world.supply(source("s"))
    world.open_all(supply)
    world.peer("a").complete = True
    world.listed = (seat("n"), backup("m"))
    assert world.later(supply, SEATED_ASK_S) == [], "nor is its backup moved"
    world.peer("b").fail(LOST)
    assert world.later(supply, SOON) == ["m"]
    assert world.reads() == ["a", "m"]


def test_in_trees_whoever_delivers_is_kept_and_an_empty_seat_is_filled(world: World) -> None:
    world.listed = (seat("a", 0, 2), seat("b", 1, 2))
    supply = world.supply(source("s"))
    world.open_all(supply)
    world.listed = (seat("n", 0, 2), seat("m", 1, 2))
    assert world.later(supply, SEATED_ASK_S) == []
    world.peer("b").fail(LOST)
    assert world.later(supply, SOON) == ["m"]
    assert world.reads() == ["a", "m"]


def test_one_that_came_back_under_another_generation_is_another_one(world: World) -> None:
    world.listed = (seat("a"),)
    supply = world.supply(source("s"))
    world.open_all(supply)
    world.peer("a").fail(LOST)
    told = record(incarnation="a", state=S.RELAYING, content_id=CONTENT, generation=2)
    world.listed = (Candidate(record=told, reason="", seated=True),)
    assert world.later(supply, SOON) == ["a"]


# ---- how often it asks


def gaps(world: World, supply: Supply, seconds: float) -> list[float]:
    """Between the questions of the next ``seconds``, looking 20 times a second."""
    first = len(world.asked)
    for _ in range(int(seconds * 20)):
        world.later(supply, 0.05)
    times = world.asked[first - 1 :]
    return [round(b - a, 1) for a, b in pairwise(times)]


def test_whoever_sits_well_asks_less_and_less_often(world: World) -> None:
    world.listed = (seat("a"), backup("b"))
    supply = world.supply(source("s"))
    world.open_all(supply)
    found = gaps(world, supply, 35.0)
    assert found == pytest.approx([SEATED_ASK_S, 2.0, 4.0, *[LAST_SEATED_ASK_S] * 3], abs=0.11)


def test_whoever_has_no_seat_asks_soon_and_then_less_often(world: World) -> None:
    world.listed = (source("s"),)
    supply = world.supply(source("s"), seated=False)
    world.open_all(supply)
    found = gaps(world, supply, 12.0)
    assert found[0] < 0.3, "a relay that began a moment later is found"
    assert found == sorted(found)
    assert max(found) <= LAST_ASK_S + 0.1
    assert found[-1] > LAST_ASK_S - 0.1


def test_for_a_lost_seat_the_server_is_asked_at_once(world: World) -> None:
    world.listed = (seat("a"), backup("b"))
    supply = world.supply(source("s"))
    world.open_all(supply)
    world.later(supply, SEATED_ASK_S)  # the next question would be two seconds away
    world.peer("a").fail(LOST)
    world.listed = (seat("n"), backup("b"))
    world.now += SOON
    asked = len(world.asked)
    assert world.open(supply) == "n"
    assert len(world.asked) == asked + 1
    assert world.reads() == ["b", "n"]


def test_until_the_server_knows_of_a_lost_seat_others_are_read(world: World) -> None:
    world.listed = (seat("a"), backup("b"), source("s"))
    supply = world.supply(source("s"))
    world.open_all(supply)
    world.peer("a").fail(LOST)
    assert "s" in world.later(supply, SOON)
    assert world.tried.count("a") == 1, "one that failed is not tried again"
    world.listed = (seat("n"), backup("b"), source("s"))
    world.later(supply, SOON)
    assert world.reads() == ["b", "n"], "the source is left in peace again"


# ---- full, silent and other candidates


def test_a_full_seat_is_tried_again_after_a_while(world: World) -> None:
    world.listed, world.refuses = (seat("a"), source("s")), {"a": SourceBusy("full", "")}
    supply = world.supply(source("s"))
    assert world.open_all(supply) == ["s"], "meanwhile somebody else is read"
    assert [each.record.incarnation for each in supply.busy.values()] == ["a"]
    asked = len(world.asked)
    world.later(supply, BUSY_S / 2)
    assert world.tried.count("a") == 1
    assert len(world.asked) == asked, "it is known where our seat is"
    world.refuses.clear()
    assert "a" in world.later(supply, BUSY_S)
    assert supply.busy == {}
    assert world.reads() == ["a"]


def test_where_all_are_full_it_ends_and_says_who(world: World) -> None:
    world.listed, world.refuses = (source("s"),), {"s": SourceBusy("full", "")}
    supply = world.supply(source("s"), seated=False)
    with pytest.raises(StopIteration):
        next(supply)
    assert [each.record.incarnation for each in supply.busy.values()] == ["s"]


@pytest.mark.parametrize("error", [LOST, AuthError("no", "")])
def test_one_that_cannot_be_opened_is_named_and_the_next_is_taken(
    world: World, error: TransferError | AuthError
) -> None:
    world.listed, world.refuses = (source("s"), source("t")), {"s": error}
    supply = world.supply(source("s"), source("t"), seated=False)
    assert world.open_all(supply) == ["t"]
    assert world.unusable == ["s"]


def test_a_relay_that_brings_nothing_is_not_waited_for(world: World) -> None:
    world.listed = (other("a"), source("s"))
    supply = world.supply(other("a"), seated=False)
    assert world.open_all(supply) == ["a"]
    world.peer("a").useful = False
    assert world.later(supply, LAST_ASK_S) == ["s"]


def test_a_relay_does_not_displace_a_source_that_ranks_before_it(world: World) -> None:
    world.listed = (source("s"), other("a"))
    supply = world.supply(source("s"), seated=False)
    assert world.open_all(supply) == ["s"]
    assert world.later(supply, LAST_ASK_S) == []


def test_other_weights_are_no_candidates(world: World) -> None:
    world.listed = (Candidate(record=record(incarnation="x", content_id="d" * 64, state=S.READY), reason=""),)
    supply = world.supply(seated=False)
    with pytest.raises(StopIteration):
        next(supply)
    assert world.tried == []


# ---- who follows a replica that reads its disk


def follower(name: str, followed: str, state: PublicationState = S.RELAYING) -> Candidate:
    told = record(
        incarnation=name,
        replica_incarnation=name,
        state=state,
        content_id=CONTENT if state is S.READY else "",
        weights_id="",
        generation=1,
        following=followed,
    )
    return Candidate(record=told, reason="")


def test_before_there_is_a_content_id_whoever_is_listed_holds_the_same(world: World) -> None:
    world.listed = (follower("b", "a"), follower("a", "a"))
    assert world.open_all(world.supply(seated=False, content_id="")) == ["b"]


def test_a_reader_of_a_disk_is_read_rather_than_those_that_rank_behind_it(world: World) -> None:
    world.listed = (follower("a", "a"), follower("b", "a"))
    supply = world.supply(seated=False, content_id="")
    assert world.open_all(supply) == ["a"]
    assert world.later(supply, LAST_ASK_S) == []


def test_a_reader_of_a_disk_is_read_beside_those_who_have_all_of_it(world: World) -> None:
    world.listed = (follower("whole", "a", S.READY), follower("a", "a"), follower("b", "a"))
    assert world.open_all(world.supply(seated=False, content_id="")) == ["whole", "a"]


def test_an_empty_content_id_is_asked_for_by_nobody_who_knows_what_is_to_be_read(world: World) -> None:
    world.listed = (follower("a", "a"),)
    with pytest.raises(StopIteration):
        next(world.supply(seated=False))


def test_where_nobody_is_worth_reading_any_more_the_pull_ends_with_that(world: World) -> None:
    def gone() -> tuple[Candidate, ...]:
        raise PeerLost("the replica that was followed is gone", "")

    world.answer = gone
    with pytest.raises(PeerLost, match="was followed"):
        next(world.supply(follower("b", "a"), seated=False, content_id=""))


# ---- without a server, and at the end


def no_server() -> tuple[Candidate, ...]:
    raise MetadataUnreachable("down", "")


def test_h33_without_a_server_the_known_ones_are_read(world: World) -> None:
    world.answer = no_server
    supply = world.supply(other("a"), source("s"))
    assert world.open(supply) == "a"
    assert world.now == 100.0, "no seats are awaited from a server that does not answer"
    world.peer("a").fail(LOST)
    assert "s" in world.later(supply, SOON)


def test_h33_a_server_that_is_lost_meanwhile_leaves_the_seats_as_they_are(world: World) -> None:
    world.listed = (seat("a"), backup("b"), source("s"))
    supply = world.supply(source("s"))
    world.open_all(supply)
    world.answer = no_server
    assert world.later(supply, SEATED_ASK_S) == []
    assert world.reads() == ["a", "b"]


def test_h68_a_server_that_came_back_empty_takes_nobody_away(world: World) -> None:
    world.listed = ()
    supply = world.supply(source("s"), source("t"), seated=False)
    assert world.open(supply) == "s"
    world.peer("s").fail(LOST)
    assert world.later(supply, SOON) == ["t"]


def test_nobody_is_asked_where_there_is_nobody_to_ask(world: World) -> None:
    supply = world.supply(source("s"), asks=False)
    assert world.open(supply) == "s"
    assert world.asked == []
    world.peer("s").fail(LOST)
    with pytest.raises(StopIteration):
        next(supply)


def test_it_ends_only_with_an_answer_of_this_moment(world: World) -> None:
    world.listed = (source("s"),)
    supply = world.supply(source("s"), seated=False)
    world.open_all(supply)
    world.peer("s").fail(LOST)
    assert next(supply) is None, "it asked a moment ago: somebody may have come since"
    world.now += SOON
    with pytest.raises(StopIteration):
        next(supply)


def test_somebody_who_came_at_the_last_moment_is_taken(world: World) -> None:
    world.listed = (source("s"),)
    supply = world.supply(source("s"), seated=False)
    world.open_all(supply)
    world.peer("s").fail(LOST)
    world.listed = (source("s"), source("t"))
    assert world.later(supply, SOON) == ["t"]


def test_a_peer_that_failed_for_whatever_reason_is_not_opened_again(world: World) -> None:
    world.listed = (other("a"),)
    supply = world.supply(other("a"), seated=False)
    world.open_all(supply)
    world.peer("a").fail(NothingNewError("nothing new", ""))
    world.now += LAST_ASK_S
    with pytest.raises(StopIteration):
        next(supply)


def test_a_peer_that_turned_out_to_be_full_may_be_opened_again(world: World) -> None:
    world.listed = (source("s"),)
    supply = world.supply(source("s"), seated=False)
    world.open_all(supply)
    world.peer("s").fail(SourceBusy("full", ""))
    assert world.later(supply, LAST_ASK_S) == ["s"]
