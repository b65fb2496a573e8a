"""What readers are told of a source that is still filling."""

from __future__ import annotations

import threading
import time

import pytest

from weightwire.errors import ProtocolError
from weightwire.manifest.availability import Availability
from weightwire.manifest.records import Entry, Layout
from weightwire.source.filling import MAX_RANGES, UPDATE_S, News, Readable
from weightwire.target.session import leaves_of
from weightwire.types import Span, TensorClass
from weightwire.wire.messages import LeafRange, ProgressUpdate

MIB = 1 << 20


def layout(*sizes: int) -> Layout:
    return Layout(
        entries=tuple(
            Entry(name=f"t{at}", dtype="uint8", shape=(size,), order=(0,), kind=TensorClass.WEIGHT, nbytes=size)
            for at, size in enumerate(sizes)
        )
    )


def test_h38_a_span_may_be_read_only_if_every_leaf_that_it_touches_is_there() -> None:
    what = layout(2 * MIB + 5, MIB, 7, 8)  # leaves of 1 MiB, 1 MiB, 5, 1 MiB, 15 bytes
    assert [leaf.span.nbytes for leaf in what.leaves] == [MIB, MIB, 5, MIB, 15]
    there = Availability(5, 0b01010)
    readable = Readable(what, there)
    whole = what.leaves[1].span
    assert readable(whole)
    assert readable(Span(whole.offset + 1, 5))
    assert readable(Span(whole.offset, 0))
    assert not readable(Span(whole.offset - 1, 2))
    assert not readable(Span(whole.offset, whole.nbytes + 1))
    assert not readable(Span(0, what.nbytes))
    for leaf in what.leaves:
        assert readable(leaf.span) is bool(there.have >> what.leaves.index(leaf) & 1)
    there.add(0b10101)
    assert readable(Span(0, what.nbytes))


def test_each_leaf_is_told_once_and_all_of_them_in_the_end() -> None:
    there = Availability(8, 0b110)
    news = News(there, 0)
    assert news.next(1) == ProgressUpdate(version=2, generation=1, ranges=(LeafRange(1, 2),))
    assert news.next(1) == ProgressUpdate(version=2, generation=1)
    there.add(0b11111001)
    assert news.next(1) == ProgressUpdate(
        version=8, generation=1, ranges=(LeafRange(0, 1), LeafRange(3, 5)), complete=True
    )


def test_a_reader_that_comes_back_is_told_what_it_may_have_missed() -> None:
    there = Availability(4, 0b11)
    assert News(there, 2).next(1).ranges == ()
    assert News(there, 1).next(1).ranges == (LeafRange(0, 2),)


def test_an_update_is_bounded_and_the_rest_follows() -> None:
    every_second = sum(1 << at for at in range(0, 4 * MAX_RANGES, 2))
    there = Availability(4 * MAX_RANGES, every_second)
    news = News(there, 0)
    first, second, third = (news.next(1) for _ in range(3))
    assert [len(each.ranges) for each in (first, second, third)] == [MAX_RANGES, MAX_RANGES, 0]
    assert leaves_of(first.ranges + second.ranges, there.leaves) == every_second


def test_news_that_come_together_travel_together() -> None:
    there, over = Availability(200), threading.Event()
    news = News(there, 0)

    def grow() -> None:
        for leaf in range(200):
            there.add(1 << leaf)
            time.sleep(0.002)

    threading.Thread(target=grow).start()
    began, updates = time.monotonic(), 0
    while not news.next(1).complete:
        updates += 1
        assert not news.wait(over)
    assert updates <= (time.monotonic() - began) / UPDATE_S + 1
    over.set()
    assert news.wait(over)


@pytest.mark.parametrize("bad", [LeafRange(0, 11), LeafRange(10, 1), LeafRange(-1, 2), LeafRange(3, -1)])
def test_h39_leaves_that_there_are_not_are_refused(bad: LeafRange) -> None:
    assert leaves_of((LeafRange(2, 3), LeafRange(9, 1)), 10) == 0b1000011100
    with pytest.raises(ProtocolError, match="offers leaves"):
        leaves_of((LeafRange(2, 3), bad), 10)
