from __future__ import annotations

import pytest
from target.schedule_world import MIB, leaves_of

from weightwire.manifest.leafset import mask_of
from weightwire.target.schedule import Lane, Schedule
from weightwire.target.shares import BACKUP, EVERYTHING, FIRST_S, LAG_CHUNKS, PROBE_S, Share, Shares

COUNT = 100
A, B = Lane(0, 0), Lane(1, 0)
ALL = (1 << COUNT) - 1


def schedule_of(count: int = COUNT, chunk: int = 1) -> Schedule:
    return Schedule(leaves_of([MIB] * count), range(count), chunk * MIB)


@pytest.mark.parametrize(("count", "chunk", "parts"), [(100, 1, 2), (97, 4, 2), (97, 4, 3), (3, 8, 2), (1, 1, 2)])
def test_shares_part_the_leaves_by_whole_chunks(count: int, chunk: int, parts: int) -> None:
    shares = Shares(leaves_of([MIB] * count), chunk * MIB)
    masks = [shares.bits(Share(part, parts)) for part in range(parts)]
    assert sum(masks) == (1 << count) - 1, "each leaf in one of them"
    first = masks[0]
    assert [at for at in range(count) if first >> at & 1] == [at for at in range(count) if at // chunk % parts == 0]
    assert shares.bits(EVERYTHING) == (1 << count) - 1
    assert shares.bits(BACKUP) == 0


def test_each_peer_is_asked_for_its_share() -> None:
    schedule = schedule_of()
    for part in (0, 1):
        schedule.join(1, 0.0, ALL >> 1, Share(part, 2))
    found: dict[Lane, list[int]] = {A: [], B: []}
    for step in range(40):
        for lane in (A, B):
            flight = schedule.claim(lane, step / 10)
            assert flight is not None
            found[lane] += flight.leaves
            schedule.arrived(flight, step / 10 + 0.05)
    assert all(at % 2 == 0 for at in found[A])
    assert all(at % 2 == 1 for at in found[B])


def test_what_a_lost_peer_was_to_bring_is_asked_of_the_others_at_once() -> None:
    schedule = schedule_of()
    schedule.join(1, 0.0, ALL >> 1, EVERYTHING)
    schedule.join(1, 0.0, ALL >> 1, BACKUP)
    assert schedule.claim(B, 0.1) is None
    schedule.drop(0)
    assert schedule.claim(B, 0.1) is not None


def test_a_parent_that_brings_at_once_what_it_gets_slowly_counts_as_delivering_between_two_leaves() -> None:
    """Its own source is capped: 16 leaves in a second, each brought a millisecond after it was there."""
    schedule = schedule_of()
    schedule.join(1, 0.0, 0, EVERYTHING)
    schedule.join(1, 0.0, None, BACKUP)
    for leaf in range(16):
        schedule.offers(0, 1 << leaf)
        flight = schedule.claim(A, leaf / 16)
        assert flight is not None
        schedule.arrived(flight, leaf / 16 + 0.001)
    probe = schedule.claim(B, 1.1)
    assert probe is not None, "a backup that is complete is tried after a second"
    schedule.arrived(probe, 1.2)
    assert schedule.claim(B, 1.5) is None
    assert schedule.claim(B, 1.0 + 5.0) is not None, "the parent has stopped"


def test_a_backup_relay_is_asked_once_its_lead_grows() -> None:
    schedule = schedule_of()
    schedule.join(1, 0.0, 0, EVERYTHING)
    schedule.join(1, 0.0, mask_of(range(20)), BACKUP)
    assert schedule.claim(B, 0.1) is None, "it may just have begun earlier"
    schedule.offers(1, mask_of(range(20 + LAG_CHUNKS)))
    assert schedule.claim(B, 0.2) is None
    schedule.offers(1, mask_of(range(21 + LAG_CHUNKS)))
    flight = schedule.claim(B, 0.3)
    assert flight is not None
    schedule.arrived(flight, 0.4)
    assert schedule.claim(B, 0.4) is None, "it is no further ahead than usual now"


def test_h25_a_share_counts_only_while_its_peer_delivers() -> None:
    schedule = schedule_of()
    schedule.join(1, 0.0, 0, EVERYTHING)
    schedule.join(1, 0.0, mask_of(range(LAG_CHUNKS)), BACKUP)
    assert schedule.claim(B, FIRST_S) is None
    assert schedule.claim(B, FIRST_S + 0.1) is not None


def test_h25_a_share_counts_no_longer_than_anything_came_for_and_two_seconds() -> None:
    """A relay brought a single leaf, slowly: so many chunks as its silence is measured by would take it an age."""
    schedule = schedule_of(3)
    schedule.join(1, 0.0, 1, EVERYTHING)
    schedule.join(1, 0.0, None, BACKUP)
    only = schedule.claim(A, 0.0)
    assert only is not None
    schedule.arrived(only, 1.0)
    assert schedule.claim(B, 1.0 + 1.0 + FIRST_S) is None
    assert schedule.claim(B, 1.0 + 1.0 + FIRST_S + 0.1) is not None


def test_a_complete_backup_is_tried_now_and_then_and_taken_where_it_is_much_faster() -> None:
    schedule = schedule_of(1000)
    schedule.join(1, 0.0, ALL, EVERYTHING)
    schedule.join(1, 0.0, None, BACKUP)
    assert schedule.claim(B, PROBE_S) is None
    for tenth in range(1, 12):
        slow = schedule.claim(A, tenth / 10)
        assert slow is not None
        schedule.arrived(slow, tenth / 10 + 0.099)
    tried = schedule.claim(B, 1.2)
    assert tried is not None
    assert schedule.claim(B, 1.2) is None, "one"
    schedule.arrived(tried, 1.201)
    assert schedule.claim(B, 1.21) is not None, "a hundred times as fast"


def test_a_complete_backup_that_is_no_faster_is_left_alone() -> None:
    schedule = schedule_of(1000)
    schedule.join(1, 0.0, ALL, EVERYTHING)
    schedule.join(1, 0.0, None, BACKUP)
    tried = 0
    for tenth in range(60):
        for lane in (A, B):
            flight = schedule.claim(lane, tenth / 10)
            tried += flight is not None and lane == B
            if flight is not None:
                schedule.arrived(flight, tenth / 10 + 0.09)
    assert tried == 2, "after one second and after three"


def test_a_complete_peer_that_has_done_its_share_helps_a_slow_one() -> None:
    schedule = schedule_of(20)
    schedule.join(1, 0.0, None, Share(0, 2))
    schedule.join(1, 0.0, 0, Share(1, 2))
    schedule.offers(1, mask_of(range(6)))
    slow = schedule.claim(B, 0.0)
    assert slow is not None
    now = 0.0
    for _ in range(10):
        now += 0.01
        flight = schedule.claim(A, now)
        assert flight is not None
        assert flight.first % 2 == 0
        schedule.arrived(flight, now)
    assert schedule.claim(A, now) is not None, "nobody can say when the other's share will come"
