from __future__ import annotations

import contextlib
import threading

import pytest

from weightwire.errors import DigestMismatch
from weightwire.target.bounce import Bounce
from weightwire.target.checks import Checks
from weightwire.target.schedule import Flight, Lane
from weightwire.types import Span


def flight(number: int) -> Flight:
    return Flight(Lane(0, 0), number, 1, Span(number, 1))


def test_flights_are_checked_in_order_beside_the_lane_and_all_before_it_ends() -> None:
    found: list[int] = []
    threads: set[int] = set()

    def check(each: Flight, bounce: Bounce | None, wire_s: float) -> None:
        del bounce, wire_s
        threads.add(threading.get_ident())
        found.append(each.first)

    with Checks(check) as checks:
        for number in range(20):
            checks.add(flight(number), None, 0.0)
    assert found == list(range(20))
    assert threads & {threading.get_ident()} == set()
    assert len(threads) == 1


def test_a_lane_is_never_far_ahead_of_its_digests() -> None:
    go, started = threading.Semaphore(0), threading.Semaphore(0)
    done: list[int] = []

    def check(each: Flight, bounce: Bounce | None, wire_s: float) -> None:
        del bounce, wire_s
        started.release()
        assert go.acquire(timeout=10)
        done.append(each.first)

    with Checks(check) as checks:
        for number in (0, 1):
            checks.add(flight(number), None, 0.0)
        assert done == []
        threading.Timer(0.05, go.release).start()
        checks.add(flight(2), None, 0.0)  # waits for the first
        assert done == [0]
        go.release(2)


def test_what_a_check_raises_is_raised_when_the_lane_ends() -> None:
    added = threading.Event()

    def check(each: Flight, bounce: Bounce | None, wire_s: float) -> None:
        del each, bounce, wire_s
        assert added.wait(10)
        raise DigestMismatch("wrong", "fetch it elsewhere")

    checks = Checks(check)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(DigestMismatch))
        stack.enter_context(checks)
        checks.add(flight(0), None, 0.0)
        added.set()
