from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.manifest.records import Leaf
from weightwire.target.worklist import Chunk, WorkList, chunked
from weightwire.types import Span, TensorClass


def leaves_of(sizes: list[int]) -> list[Leaf]:
    leaves, offset = [], 0
    for size in sizes:
        leaves.append(Leaf(Span(offset, size), TensorClass.WEIGHT))
        offset += size
    return leaves


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.data(), st.integers(1, 30))
def test_chunks_hold_every_missing_leaf_once_and_stay_small(sizes: list[int], data: st.DataObject, bound: int) -> None:
    leaves = leaves_of(sizes)
    missing = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    chunks = chunked(leaves, missing, bound)
    assert sorted(index for chunk in chunks for index in chunk.leaves) == sorted(missing)
    for chunk in chunks:
        assert chunk.span == Span(leaves[chunk.first].span.offset, sum(sizes[i] for i in chunk.leaves))
        assert chunk.span.nbytes <= bound or chunk.count == 1


def test_a_chunk_that_came_back_is_handed_out_again_first() -> None:
    chunks = chunked(leaves_of([1, 1, 1]), range(3), 1)
    work = WorkList(chunks)
    first = work.claim()
    assert first == chunks[0]
    work.give_back(first)
    assert work.claim() == chunks[0]
    assert work.retries == 1


def test_nothing_is_claimed_twice_and_only_verified_leaves_count() -> None:
    work = WorkList(chunked(leaves_of([1, 1]), range(2), 1))
    first, second = work.claim(), work.claim()
    assert first is not None
    assert second is not None
    assert work.claim() is None
    assert not work.finished
    work.verified(first)
    assert work.verified_leaves == {0}
    assert not work.wait(0.01)
    work.verified(second)
    assert work.wait(0.01)


def test_an_empty_list_is_finished() -> None:
    assert WorkList([]).finished


def test_only_a_claimed_chunk_can_be_verified() -> None:
    work = WorkList([Chunk(0, 1, Span(0, 1))])
    with pytest.raises(KeyError):
        work.verified(Chunk(0, 1, Span(0, 1)))


def test_chunks_that_follow_each_other_are_claimed_together_up_to_a_size() -> None:
    work = WorkList(chunked(leaves_of([1] * 9), [0, 1, 2, 3, 5, 6, 7, 8], 1))
    assert work.extent == range(9)
    assert work.claim(3) == Chunk(0, 3, Span(0, 3))
    assert work.claim(3) == Chunk(3, 1, Span(3, 1))  # leaf 4 is there already
    last = work.claim(100)
    assert last == Chunk(5, 4, Span(5, 4))
    work.give_back(last)
    assert len(work) == 1
    assert work.claim() == last
    work.verified(last)
    assert work.verified_leaves == {5, 6, 7, 8}
