from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport.peers import joined, pattern, soon, space, thread

from weightwire.errors import FenceTimeout, GenerationMoved
from weightwire.manifest.address import Segment
from weightwire.transport import ledger, memory
from weightwire.transport.landing import Landing, Staging
from weightwire.types import Span


def test_a_view_is_the_memory_itself() -> None:
    array = np.zeros(10, dtype=np.uint8)
    memory.view(array.ctypes.data + 2, 3)[:] = b"abc"
    assert bytes(array) == b"\0\0abc\0\0\0\0\0"
    assert memory.view(0, 0).nbytes == 0
    for address, nbytes in ((0, 1), (array.ctypes.data, -1)):
        with pytest.raises(ValueError, match="no memory"):
            memory.view(address, nbytes)


@given(st.lists(st.integers(1, 9), max_size=8), st.data())
def test_consume_drops_exactly_the_first_bytes(sizes: list[int], data: st.DataObject) -> None:
    whole = bytes(range(sum(sizes)))
    buffers: deque[memoryview] = deque()
    at = 0
    for size in sizes:
        buffers.append(memoryview(whole)[at : at + size])
        at += size
    done = data.draw(st.integers(0, len(whole)))
    memory.consume(buffers, done)
    assert b"".join(buffers) == whole[done:]
    assert all(buffer.nbytes for buffer in buffers)


def places(segments: list[Segment]) -> list[tuple[int, str]]:
    return [(segment.address + at, segment.device) for segment in segments for at in range(segment.nbytes)]


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["cpu", "cuda:0", "cuda:1"])), max_size=10))
def test_runs_are_alike_in_order_complete_and_bounded(shape: list[tuple[int, str]]) -> None:
    segments, offset = [], 0
    for nbytes, device in shape:
        segments.append(Segment(offset, 1000 + offset, nbytes, device))
        offset += nbytes
    found = list(memory.runs(segments, stage_bytes=8))
    pieces = [piece for run in found for piece in run]
    assert places(pieces) == places(segments)
    assert all(piece.address - 1000 == piece.offset for piece in pieces)
    for run in found:
        assert len({piece.device for piece in run}) == 1
        assert run[0].device == "cpu" or sum(piece.nbytes for piece in run) <= 8


def test_load_and_store_are_each_other_s_inverse() -> None:
    source, _ = space(pattern(1000), 7)
    target, parts = space(np.zeros(1000, dtype=np.uint8), 4)
    flat = bytearray(600)
    memory.load(source.slices(Span(100, 600)), memoryview(flat))
    memory.store(memoryview(flat), target.slices(Span(100, 600)))
    assert np.array_equal(joined(parts)[100:700], pattern(1000)[100:700])
    assert not joined(parts)[:100].any()
    assert not joined(parts)[700:].any()


@given(st.lists(st.integers(1, 5), min_size=1))
def test_a_landing_takes_bytes_in_any_portions(portions: list[int]) -> None:
    content = pattern(200)
    target, parts = space(np.zeros(200, dtype=np.uint8), 9)
    landing = Landing(target.slices(Span(10, 150)), Staging())
    at = 10
    while buffers := landing.buffers(2):
        nbytes = min(portions[at % len(portions)], sum(buffer.nbytes for buffer in buffers))
        left = nbytes
        for buffer in buffers:
            some = min(left, buffer.nbytes)
            buffer[:some] = content[at : at + some].tobytes()
            at, left = at + some, left - some
        landing.advance(nbytes)
    assert at == 160
    assert np.array_equal(joined(parts)[10:160], content[10:160])
    assert not joined(parts)[160:].any()


def test_draining_waits_for_uses_and_refuses_new_ones() -> None:
    book = ledger.Ledger()
    held = book.add(space(pattern(10))[0])
    inside, leave = threading.Event(), threading.Event()

    def use() -> None:
        with book.use(held, lambda: None):
            inside.set()
            leave.wait(10)

    with thread(use):
        inside.wait(10)
        began = time.monotonic()
        threading.Timer(0.1, leave.set).start()
        book.drain(held, soon())
        assert time.monotonic() - began > 0.05
    book.drain(held, soon())
    with pytest.raises(GenerationMoved), book.use(held, lambda: None):
        pass


def test_a_use_that_cannot_be_cut_ends_in_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "CUT_GRACE_S", 0.1)
    book = ledger.Ledger()
    held = book.add(space(pattern(10))[0])
    cut: list[bool] = []
    with book.use(held, lambda: cut.append(True)), pytest.raises(FenceTimeout):
        book.drain(held, soon(0.05))
    assert cut == [True]
