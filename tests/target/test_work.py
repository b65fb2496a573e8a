"""``Work``: which lanes wake for what."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from target.schedule_world import leaves_of
from transport.peers import space

from weightwire.target.schedule import Lane, Schedule
from weightwire.target.shares import EVERYTHING
from weightwire.target.work import Work

LONG_S = 10.0
QUIET_S = 0.2


class Idle:
    """A lane of ``peer`` that has nothing to do."""

    def __init__(self, work: Work, peer: int) -> None:
        self.woke = threading.Event()
        self.finished = False
        self._work, self._peer = work, peer
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        self.finished = self._work.wait(self._peer, LONG_S)
        self.woke.set()


@pytest.fixture
def work() -> Work:
    """Two leaves, and two peers that have none of them yet."""
    memory, _ = space(np.zeros(2, np.uint8))
    made = Work(Schedule(leaves_of([1, 1]), range(2), 1), memory)
    for _ in range(2):
        made.join(1, 0, EVERYTHING)
    return made


def idle(work: Work) -> list[Idle]:
    lanes = [Idle(work, peer) for peer in range(2)]
    until = time.monotonic() + LONG_S / 2
    while not all(news._waiters for news in work._news):  # type: ignore[attr-defined]
        assert time.monotonic() < until
        time.sleep(0.001)
    time.sleep(QUIET_S)
    assert not any(lane.woke.is_set() for lane in lanes)
    return lanes


def test_news_of_a_peer_wake_its_lanes_and_no_others(work: Work) -> None:
    other, its = idle(work)
    work.offers(1, 0b11)
    assert its.woke.wait(LONG_S / 2)
    assert not other.woke.wait(QUIET_S)


def test_what_comes_back_wakes_everybody(work: Work) -> None:
    work.offers(0, 0b11)
    flight = work.claim(Lane(0, 0))
    assert flight is not None
    lanes = idle(work)
    work.refused(flight)
    assert all(lane.woke.wait(LONG_S / 2) for lane in lanes)


def test_the_end_wakes_everybody_at_once(work: Work) -> None:
    work.offers(0, 0b11)
    for left in (1, 0):
        flight = work.claim(Lane(0, 0))
        assert flight is not None
        if not left:
            lanes = idle(work)
        work.arrived(flight, None)
    assert all(lane.woke.wait(LONG_S / 2) and lane.finished for lane in lanes)
