from __future__ import annotations

import threading
import time

from weightwire.manifest.availability import Availability


def test_it_only_grows_and_knows_no_leaf_that_there_is_not() -> None:
    there = Availability(5, 0b1)
    assert (there.have, there.version, there.complete) == (0b1, 1, False)
    there.add(0b1100)
    there.add(0b100)
    assert (there.have, there.version, there.fraction) == (0b1101, 3, 0.6)
    there.add(0b1110010)
    assert there.complete
    assert there.have == 0b11111
    assert Availability(0).complete


def test_a_run_is_covered_only_if_all_of_it_is() -> None:
    there = Availability(6, 0b101110)
    assert there.covers(1, 3)
    assert not there.covers(0, 2)
    assert not there.covers(3, 2)
    assert there.covers(5, 1)
    there.add(0b10001)
    assert there.covers(0, 6)


def test_who_waits_wakes_for_news_and_when_poked() -> None:
    there = Availability(3)
    for wake in (lambda: there.add(0b10), there.poke):
        threading.Timer(0.1, wake).start()
        began = time.monotonic()
        there.wait(there.version, 20)
        assert time.monotonic() - began < 10
    there.wait(0, 20)  # there is news already
