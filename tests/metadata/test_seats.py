from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_samples import rank as record

from weightwire.metadata.listing import find_shard
from weightwire.metadata.selection import CHAIN, Seat, rank, seated, seats
from weightwire.metadata.slots import Slot
from weightwire.metadata.standing import Standing
from weightwire.wire.messages import FindShard, PublicationState

GOOD = Standing(suspect=False, reports=0, quarantine="")
RELAYS = st.integers(1, 400)


def idle(_: object) -> int:
    return 0


# ---- places


@given(RELAYS)
def test_h25_everybody_reads_first_from_an_earlier_one_or_a_complete_replica(relays: int) -> None:
    for place in range(relays):
        first = seats(relays, place)[0]
        assert first.parts > 0
        assert first.place is None or first.place < place


@given(RELAYS)
def test_every_relay_is_given_everything_once_and_sends_no_more_than_it_takes(relays: int) -> None:
    carries: Counter[int | None] = Counter()
    for place in range(relays):
        shares = [seat for seat in seats(relays, place) if seat.parts]
        assert sorted((seat.part, seat.parts) for seat in shares) in ([(0, 1)], [(0, 2), (1, 2)])
        for seat in shares:
            assert seat.place != place
            carries[seat.place] += 2 // seat.parts
    assert carries.pop(None) == 2, "the sources send one copy"
    assert max(carries.values(), default=0) <= 2


@given(RELAYS, st.integers(0, 1))
def test_each_tree_leads_to_the_sources_within_the_logarithm(relays: int, part: int) -> None:
    for place in range(relays):
        at: int | None = place
        steps = 0
        while at is not None:
            found = [seat for seat in seats(relays, at) if seat.parts and (seat.parts == 1 or seat.part == part)]
            at = found[0].place
            steps += 1
        assert steps <= (relays if relays <= CHAIN else relays.bit_length() + 1)


def test_in_the_chain_the_one_before_the_next_is_the_backup() -> None:
    assert seats(5, 3) == (Seat(2), Seat(1, parts=0))
    assert seats(5, 1) == (Seat(0), Seat(None, parts=0))
    assert seats(5, 0) == (Seat(None),)


# ---- who sits there


def test_the_asker_is_left_out_of_those_it_may_read_from() -> None:
    others = [at for at in range(40) if at != 7]
    for relay, seat in seated(others, 7, [-1], idle, begun=False):
        assert relay == seat.place
        assert relay != 7


def test_the_head_of_the_chain_reads_from_several_complete_replicas_so_that_their_caps_add_up() -> None:
    complete = ["a", "b", "c", "d", "e"]
    assert [each for each, _ in seated([], 0, complete, idle, begun=False)] == ["a", "b", "c", "d"]
    assert [each for each, _ in seated(["x"], 1, complete, idle, begun=False)] == ["x", "a"]
    of_trees = seated([str(at) for at in range(40)], 0, complete, idle, begun=False)
    assert [(each, seat.parts) for each, seat in of_trees[:2]] == [("a", 2), ("b", 2)]


def test_in_a_tree_a_parent_that_has_its_readers_gives_way_to_a_near_one_that_has_room() -> None:
    relays = list(range(39))
    usual = {seat.part: each for each, seat in seated(relays, 20, [0], idle, begun=False)}
    readers = {usual[0]: 2, usual[0] - 1: 2, usual[0] + 1: 1} | dict.fromkeys(set(relays) - {usual[0] + 1}, 2)
    found = {seat.part: each for each, seat in seated(relays, 20, [0], lambda each: readers[each], begun=False)}
    assert found[0] == usual[0] + 1


def test_h38_whoever_lost_the_root_of_its_tree_reads_from_a_complete_replica() -> None:
    relays = list(range(39))
    for of_source, root in ((1, True), (2, False)):
        readers = dict.fromkeys(relays, 2) | {-1: of_source}
        found = seated(relays, 20, [-1], readers.__getitem__, begun=True)
        assert [each < 0 for each, _ in found] == [root, root]
        assert [seat.parts for _, seat in found] == [2, 2]
    first = seated(relays, 20, [-1], lambda _: 0, begun=False)
    assert all(each >= 0 for each, _ in first), "those who begin together do not all do so"


def test_h25_in_its_own_tree_it_is_given_no_later_one_whoever_has_room() -> None:
    relays = list(range(39))
    readers = [3] * 20 + [0] * 19
    own, other = seated(relays, 20, [0], lambda each: readers[each], begun=False)
    assert own[0] < 20
    assert other[0] >= 20


# ---- as an answer


def slot(arrival: int, state: PublicationState = PublicationState.RELAYING, **changes: object) -> Slot:
    made = record(0, f"life{arrival}", state=state)
    relayed = arrival if state is PublicationState.RELAYING else 0
    found = Slot(
        shard_key="shard-0",
        incarnation=made.incarnation,
        generation=1,
        sequence=1,
        record=made,
        arrival=arrival,
        relayed=relayed,
    )
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def names(found: list[tuple[Slot, Standing]], asker: int | None) -> list[tuple[str, bool, int]]:
    return [(each.record.incarnation, each.seated, each.parts) for each in rank(found, asker)]


READY = PublicationState.READY


def test_a_newcomer_is_told_its_place_and_the_others_behind() -> None:
    found = [(slot(at), GOOD) for at in (2, 5, 3, 9)] + [(slot(1, READY), GOOD)]
    assert names(found, 7)[:2] == [("life5-0", True, 1), ("life3-0", True, 0)]
    assert [name for name, taken, _ in names(found, 7) if not taken] == ["life2-0", "life1-0", "life9-0"], "late last"
    assert names(found, 2)[0] == ("life1-0", True, 1)
    assert not any(taken for _, taken, _ in names(found, None))


def reader_of_a_disk(arrival: int, replica: str) -> Slot:
    made = slot(arrival)
    assert made.record is not None
    fields: dict[str, Any] = {"replica_incarnation": replica, "following": replica, "content_id": "", "weights_id": ""}
    return dataclasses.replace(made, record=dataclasses.replace(made.record, **fields))


@pytest.mark.parametrize("followers", [3, 40])
def test_a_reader_of_a_disk_stands_where_complete_replicas_do(followers: int) -> None:
    """Else it would be one of the relays itself: and the root of one tree, where there are two, would have nobody."""
    disk = reader_of_a_disk(1, "first")
    taking = [slot(at) for at in range(2, 2 + followers)]
    found = [(each, GOOD) for each in (disk, *taking)]
    assert names(found, 2)[0] == ("life1-0", True, 1 if followers == 3 else 2)
    assert names(found, 3)[0] == (("life2-0", True, 1) if followers == 3 else ("life1-0", True, 2)), "the other root"
    assert rank(found, 2)[0].reason.startswith("idle reader of its disk")


def test_h38_those_behind_one_that_died_or_is_doubted_close_up() -> None:
    suspect = Standing(suspect=True, reports=0, quarantine="")
    found = [(slot(1, READY), GOOD), (slot(2), GOOD), (slot(3), GOOD)]
    assert names([*found, (slot(4), GOOD)], 5)[0] == ("life4-0", True, 1)
    assert names([*found, (slot(4), suspect)], 5)[0] == ("life3-0", True, 1)
    assert names([*found, (slot(4), suspect)], 5)[-1] == ("life4-0", False, 1)
    assert names(found, 5)[0] == ("life3-0", True, 1)


@pytest.mark.parametrize("count", [3, 40])
def test_the_answer_does_not_depend_on_the_order_of_what_is_found(count: int) -> None:
    found = [(slot(at, READY if at < 2 else PublicationState.RELAYING), GOOD) for at in range(count)]
    assert names(found, 2) == names(found[::-1], 2)


def test_the_server_answers_an_asker_with_its_place() -> None:
    slots = [slot(1, READY), slot(2), slot(3), slot(4), slot(5, PublicationState.LOADING)]
    question = FindShard(shard_key="shard-0", weights_id="weights", exclude=("life4-0",), asker="life4-0")
    whole = [
        dataclasses.replace(each, record=dataclasses.replace(each.record, world_size=1))
        for each in slots
        if each.record
    ]
    found = find_shard(question, whole).candidates
    assert [(each.record.incarnation, each.seated, each.parts) for each in found] == [
        ("life3-0", True, 1),
        ("life2-0", True, 0),
        ("life1-0", False, 1),
    ]
    for without in ("somebody", "life5-0"):
        unknown = find_shard(dataclasses.replace(question, asker=without), whole).candidates
        assert not any(each.seated for each in unknown), "only relays have places"
