from __future__ import annotations

import threading
from collections import deque

import pytest

from weightwire.transport import memory
from weightwire.transport.pacing import BURST_S, MAX_PIECE, MIN_PIECE, Bucket, Pacer

RATE = 1_000_000.0


class Clock:
    """Time that passes only where somebody rests."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def rest(self, seconds: float) -> bool:
        self.now += seconds
        return False


def test_a_bucket_keeps_to_its_rate_but_for_one_burst() -> None:
    bucket, now, sent = Bucket(RATE), 5.0, 0
    for _ in range(1000):
        now = max(now, bucket.reserve(20_000, now))
        sent += 20_000
        assert sent <= RATE * (now - 5.0 + BURST_S) + 20_001
    assert now - 5.0 == pytest.approx(20.0 - BURST_S, abs=0.03)


def test_a_long_silence_saves_up_no_more_than_a_burst() -> None:
    bucket = Bucket(RATE)
    bucket.reserve(1, 0.0)
    turns = [bucket.reserve(10_000, 1000.0) for _ in range(20)]
    assert sum(10_000 for turn in turns if turn <= 1000.0) <= RATE * BURST_S + 10_000


def test_those_who_always_want_more_get_equal_parts() -> None:
    clock = Clock()
    pacer = Pacer(RATE, clock=clock)
    turns = {name: pacer.reserve(pacer.piece) for name in "abc"}
    sent = dict.fromkeys(turns, 0)
    while clock.now < 110:
        name = min(turns, key=turns.__getitem__)
        assert pacer.hold(turns[name], clock.rest)
        sent[name] += 1
        turns[name] = pacer.reserve(pacer.piece)
    assert max(sent.values()) - min(sent.values()) <= 1


def test_a_new_rate_holds_from_the_next_turn_on() -> None:
    clock = Clock()
    pacer = Pacer(RATE, clock=clock)
    while pacer.reserve(100_000) <= clock.now:
        pass
    pacer.rate = 10 * RATE
    before = pacer.reserve(100_000)
    assert pacer.reserve(100_000) - before == pytest.approx(0.01)


def test_without_a_rate_nobody_waits() -> None:
    pacer = Pacer(waited=lambda _: pytest.fail("waited"))
    assert all(pacer.hold(pacer.reserve(1 << 40), lambda _: pytest.fail("rested")) for _ in range(3))


def test_a_wait_is_told_and_can_be_ended() -> None:
    waited: list[float] = []
    clock, over = Clock(), threading.Event()
    pacer = Pacer(RATE, clock=clock, waited=waited.append)
    pacer.reserve(1_000_000)
    assert pacer.hold(pacer.reserve(1), clock.rest)
    assert waited == [pytest.approx(1.0 - BURST_S)]
    over.set()
    pacer.reserve(10_000_000)
    assert not pacer.hold(pacer.reserve(1), over.wait)


@pytest.mark.parametrize(("rate", "piece"), [(1e5, MIN_PIECE), (1e8, 1_000_000), (1e12, MAX_PIECE)])
def test_a_piece_is_short_in_time_and_bounded_in_size(rate: float, piece: int) -> None:
    assert Pacer(rate).piece == piece


def test_the_first_bytes_of_some_buffers() -> None:
    buffers = deque(memoryview(part) for part in (b"abc", b"", b"defg"))
    assert b"".join(memory.take(buffers, 5)) == b"abcde"
    assert b"".join(memory.take(buffers, 5)) == b"fg"
    assert not memory.take(buffers, 5)
