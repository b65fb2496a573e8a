from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from target.schedule_world import FENCE_S, MIB, NEVER, STALL_S, Kind, World, leaves_of

from weightwire.manifest.leafset import indices, mask_of, runs
from weightwire.target.schedule import Lane, Pace, Schedule
from weightwire.target.shares import BACKUP, EVERYTHING, Share
from weightwire.types import Span

A, B = Lane(0, 0), Lane(1, 0)


def world_of(count: int, *kinds: Kind, chunk: int = 4, pace: Pace | None = None) -> World:
    leaves = leaves_of([MIB] * count)
    return World(Schedule(leaves, range(count), chunk * MIB, pace or Pace()), leaves, kinds)


# ---- chunks


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.data(), st.integers(1, 30))
def test_chunks_hold_every_missing_leaf_once_and_stay_small(sizes: list[int], data: st.DataObject, bound: int) -> None:
    leaves = leaves_of(sizes)
    missing = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    schedule = Schedule(leaves, missing, bound)
    schedule.join(1, 0.0)
    found: list[int] = []
    while (flight := schedule.claim(A, 0.0)) is not None:
        found += flight.leaves
        assert flight.span == Span(leaves[flight.first].span.offset, sum(sizes[i] for i in flight.leaves))
        assert flight.span.nbytes <= bound or flight.count == 1
        schedule.arrived(flight, 0.0)
    assert found == sorted(missing)
    assert schedule.finished


def test_what_was_released_is_asked_for_again_first() -> None:
    schedule = Schedule(leaves_of([1, 1, 1]), range(3), 1)
    schedule.join(1, 0.0)
    first = schedule.claim(A, 0.0)
    assert first is not None
    assert not schedule.released(A).copy
    again = schedule.claim(A, 0.0)
    assert again is not None
    assert again.leaves == first.leaves
    assert schedule.retries == 1


def test_only_what_was_asked_for_can_arrive() -> None:
    schedule = Schedule(leaves_of([1]), range(1), 1)
    schedule.join(1, 0.0)
    flight = schedule.claim(A, 0.0)
    assert flight is not None
    schedule.released(A)
    with pytest.raises(ValueError, match="not in list"):
        schedule.arrived(flight, 0.0)
    assert not schedule.verified


def test_a_lane_may_ask_for_more_at_a_time_once_its_peer_is_known_to_be_fast() -> None:
    schedule = Schedule(leaves_of([1] * 900), range(900), 1)
    schedule.join(1, 0.0)
    first = schedule.claim(A, 0.0)
    assert first is not None
    assert schedule.claim(A, 0.0) is None, "one at a time while nothing is known of it"
    schedule.arrived(first, 0.0001)
    second = schedule.claim(A, 0.0001, 100)
    assert second is not None
    assert second.count == 100


def test_no_read_takes_so_long_that_a_chain_would_wait_for_it() -> None:
    schedule = Schedule(leaves_of([1] * 900), range(900), 1)
    schedule.join(1, 0.0)
    first = schedule.claim(A, 0.0)
    assert first is not None
    schedule.arrived(first, 0.001)
    second = schedule.claim(A, 0.001, 100)
    assert second is not None
    assert second.count == 30, "30 ms of a thousand leaves a second"


def test_the_first_read_of_a_peer_is_small_for_a_chain_waits_for_it_at_every_link() -> None:
    schedule = Schedule(leaves_of([MIB] * 64), range(64), 4 * MIB)
    schedule.join(2, 0.0)
    for lane in (A, Lane(0, 1)):
        first = schedule.claim(lane, 0.0, 16 * MIB)
        assert first is not None
        assert first.count == 1


def test_an_empty_schedule_is_finished() -> None:
    assert Schedule([], (), 1).finished
    assert Schedule([], (), 1).extent == range(0)


@given(st.sets(st.integers(0, 300)))
def test_sets_of_leaves_are_bits(leaves: set[int]) -> None:
    assert list(indices(mask_of(leaves))) == sorted(leaves)
    assert all(before.stop < after.start for before, after in itertools.pairwise(runs(mask_of(leaves))))


# ---- windows


def test_a_slow_peer_holds_little() -> None:
    world = world_of(400, Kind(speed=100 * MIB), Kind(speed=MIB))
    world.run(3.0)
    fast, slow = (
        sum(f.span.nbytes for line in world.lines.values() if line.lane.peer == n for f in line.under_way)
        for n in (0, 1)
    )
    assert slow <= MIB
    assert fast >= 8 * MIB
    world.run(60)
    assert world.schedule.finished
    assert world.now < 4.5
    assert world.schedule.duplicated <= 2 * MIB


def test_peers_deliver_by_their_speed_and_add_up() -> None:
    world = world_of(600, Kind(speed=30 * MIB), Kind(speed=20 * MIB), Kind(speed=10 * MIB))
    world.run(60)
    assert world.schedule.finished
    assert world.now < 1.06 * 600 / 60
    assert [round(nbytes / MIB / 100) for nbytes in world.delivered] == [3, 2, 1]
    assert world.schedule.duplicated <= 8 * MIB


def test_equal_peers_repeat_nothing() -> None:
    world = world_of(600, Kind(speed=20 * MIB), Kind(speed=20 * MIB))
    world.run(60)
    assert world.schedule.finished
    assert world.schedule.duplicated == 0
    assert world.now < 1.05 * 600 / 40


# ---- relays


def test_a_peer_is_asked_only_for_what_it_has() -> None:
    half = mask_of(range(50))
    world = world_of(100, Kind(speed=100 * MIB, grows=((1.0, half), (2.0, half << 50))))
    world.run(0.99)
    assert not world.placed
    world.run(1.99)
    assert world.placed == set(range(50))
    world.run(9)
    assert world.schedule.finished


# ---- the end


def test_h27_the_last_chunks_of_a_frozen_peer_come_from_another_before_it_counts_as_stalled() -> None:
    world = world_of(100, Kind(speed=50 * MIB), Kind(speed=50 * MIB, freezes=0.5))
    world.run(60)
    assert world.schedule.finished
    assert world.now < 3.5 < STALL_S
    assert world.fenced == {1}
    assert 0 < world.schedule.duplicated <= 20 * MIB


def test_h48_bounce_buffers_are_bounded() -> None:
    pace = Pace(bounce=4 * MIB)
    world = world_of(200, Kind(speed=50 * MIB), Kind(speed=50 * MIB, freezes=0.7, lanes=4), pace=pace, chunk=2)
    world.run(60)
    assert world.schedule.finished
    assert world.now < STALL_S
    assert 0 < world.most_bounced <= 4 * MIB


def test_without_bounce_buffers_a_peer_that_holds_up_the_end_is_fenced_first() -> None:
    world = world_of(100, Kind(speed=50 * MIB), Kind(speed=50 * MIB, freezes=0.5), pace=Pace(bounce=0))
    world.run(60)
    assert world.schedule.finished
    assert world.now < 5.0
    assert world.schedule.duplicated == 0
    assert world.fenced == {1}


def test_h64_what_was_repeated_is_copied_only_once_its_first_writer_is_gone() -> None:
    schedule = Schedule(leaves_of([1, 1]), range(2), 1)
    schedule.join(1, 0.0)
    schedule.join(1, 0.0)
    slow, fast = schedule.claim(A, 0.0), schedule.claim(B, 0.0)
    assert slow is not None
    assert fast is not None
    schedule.arrived(fast, 0.1)
    second = schedule.claim(B, 5.0)
    assert second is not None
    assert second.twin is slow
    todo = schedule.arrived(second, 5.1)
    assert todo.fence == (A,)
    assert not todo.copy
    assert schedule.verified == fast.mask, "the first one may still write"
    todo = schedule.released(A)
    assert todo.copy == (second,)
    assert schedule.verified == fast.mask, "it is not in place yet"
    schedule.copied(second)
    assert schedule.finished
    assert schedule.duplicated == 1


def test_a_repetition_that_comes_too_late_is_dropped() -> None:
    schedule = Schedule(leaves_of([1, 1]), range(2), 1)
    schedule.join(1, 0.0)
    schedule.join(1, 0.0)
    slow, fast = schedule.claim(A, 0.0), schedule.claim(B, 0.0)
    assert slow is not None
    assert fast is not None
    schedule.arrived(fast, 0.1)
    second = schedule.claim(B, 5.0)
    assert second is not None
    schedule.arrived(slow, 5.1)
    assert schedule.finished
    assert schedule.arrived(second, 5.2).drop == (second,)


def test_when_both_who_were_asked_for_a_leaf_fail_it_is_missing_again() -> None:
    schedule = Schedule(leaves_of([1, 1]), range(2), 1)
    schedule.join(1, 0.0)
    schedule.join(1, 0.0)
    slow, fast = schedule.claim(A, 0.0), schedule.claim(B, 0.0)
    assert slow is not None
    assert fast is not None
    schedule.arrived(fast, 0.1)
    second = schedule.claim(B, 5.0)
    assert second is not None
    schedule.released(A)
    assert not schedule.may_claim(0), "it is on its way already"
    schedule.released(B)
    again = schedule.claim(A, 5.1)
    assert again is not None
    assert again.twin is None
    assert again.leaves == slow.leaves
    assert schedule.retries == 2


def test_h48_the_room_of_a_dropped_bounce_buffer_is_free_again() -> None:
    schedule = Schedule(leaves_of([1, 1, 1]), range(3), 1, Pace(bounce=1))
    schedule.join(2, 0.0)
    schedule.join(1, 0.0)
    slow = [schedule.claim(lane, 0.0) for lane in (A, Lane(0, 1))]
    fast = schedule.claim(B, 0.0)
    assert fast is not None
    schedule.arrived(fast, 0.1)
    for at, repeated in enumerate(slow):
        second = schedule.claim(B, 5.0 * at + 5.0)
        assert second is not None
        assert second.twin is repeated
        assert schedule.claim(B, 5.0 * at + 5.0) is None, "no room"
        schedule.arrived(second, 5.0 * at + 5.1)
        assert repeated is not None
        assert schedule.arrived(repeated, 5.0 * at + 5.2).drop == (second,)
    assert schedule.finished


def test_a_leaf_is_not_taken_from_one_peer_and_the_other_for_ever() -> None:
    schedule = Schedule(leaves_of([1, 1, 1]), range(3), 1, Pace(bounce=0))
    now, held = 0.1, {}
    for number, lane in enumerate((A, B)):
        assert schedule.join(1, 0.0) == number
        held[lane] = schedule.claim(lane, 0.0)
    for flight in held.values():
        assert flight is not None
        schedule.arrived(flight, now)
    holder, idle, patience = A, B, list[float]()
    for again in range(4):
        assert schedule.claim(holder, now) is not None
        began = now
        while not schedule.overdue(idle, now).fence:
            now += 0.05
            assert now < 1000
        patience.append(now - began)
        schedule.released(holder)
        assert again or schedule.claim(holder, now) is None, "it was just taken from this one"
        holder, idle = idle, holder
    assert all(after > 1.5 * before for before, after in itertools.pairwise(patience))


# ---- whatever happens

TIMES = st.floats(0.0, 8.0)
BITS = st.integers(0, (1 << 40) - 1)
KINDS = st.builds(
    Kind,
    speed=st.floats(0.05, 200.0).map(lambda mib: mib * MIB),
    lanes=st.integers(1, 4),
    depth=st.integers(1, 3),
    dies=st.one_of(st.just(NEVER), TIMES),
    freezes=st.one_of(st.just(NEVER), TIMES),
    bad=st.one_of(st.just(frozenset[int]()), st.frozensets(st.integers(0, 39), max_size=3)),
    grows=st.one_of(st.none(), st.lists(st.tuples(TIMES, BITS), max_size=4).map(tuple)),
    share=st.sampled_from([EVERYTHING, EVERYTHING, BACKUP, Share(0, 2), Share(1, 2)]),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, MIB), min_size=1, max_size=40),
    kinds=st.lists(KINDS, min_size=1, max_size=5),
    chunk=st.integers(1, 4),
    bounce=st.sampled_from([0, 2 * MIB, 32 * MIB]),
    sound=st.booleans(),
)
@example(
    sizes=[1, 1],
    kinds=[Kind(speed=MIB, share=BACKUP), Kind(speed=MIB, grows=((0.0, 1),))],
    chunk=4,
    bounce=0,
    sound=False,
).via("waited for ever")
@example(
    sizes=[1, 1, 1, 1, 1, 734004, 1, 262144, 209711],
    kinds=[
        Kind(speed=MIB / 4, lanes=1, depth=1, share=BACKUP),
        Kind(speed=MIB, lanes=1, depth=1, freezes=1.0, grows=((0.0, 352),)),
        Kind(speed=MIB, lanes=4, depth=1),
    ],
    chunk=1,
    bounce=0,
    sound=False,
).via("fenced again and again")
def test_h64_every_leaf_is_verified_once_whatever_the_peers_do(
    sizes: list[int], kinds: list[Kind], chunk: int, bounce: int, sound: bool
) -> None:
    if sound:
        kinds = [*kinds, Kind(speed=MIB)]
    leaves = leaves_of(sizes)
    schedule = Schedule(leaves, range(len(leaves)), chunk * MIB, Pace(bounce=bounce))
    world = World(schedule, leaves, kinds)
    total = sum(sizes)
    fastest = max((kind.speed for kind in kinds if kind.sound), default=0.0)
    bound = 3 * total / fastest + (len(kinds) + 1) * (STALL_S + FENCE_S + 5.0) + 8.0 if fastest else 60.0
    world.run(bound)
    assert schedule.finished or not fastest, "it did not end in time"
    assert schedule.finished == (len(world.placed) == len(leaves))
    assert world.most_bounced <= bounce
    once = [at for at in range(len(leaves)) if at not in world.repeated]
    assert all(world.brought[at] <= 1 for at in once), "fetched twice outside of the end game"
    assert world.bytes_brought <= total + schedule.duplicated
