"""The block table against blocks that are cut one at a time, and digests made from it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_support import BLOCK, reference_digest, space

from weightwire.manifest import device_digest, digest
from weightwire.manifest.address import AddressSpace, Spans
from weightwire.manifest.device_blocks import ALIGNMENT, Blocks
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.memory import view
from weightwire.manifest.records import Leaf
from weightwire.types import Span, TensorClass

spans_of = st.lists(st.tuples(st.integers(0, 5 * BLOCK), st.integers(0, 3 * BLOCK)), max_size=8)
cuts_of = st.lists(st.integers(1, 5 * BLOCK), max_size=8)


def made(cuts: list[int], spans: list[tuple[int, int]], gap: int) -> tuple[bytes, AddressSpace, list[Span]]:
    data = random.Random(1).randbytes(5 * BLOCK)
    inside = [Span(begin, min(nbytes, len(data) - begin)) for begin, nbytes in spans]
    return data, space(data, [cut for cut in cuts if cut < len(data)], gap), inside


@settings(deadline=None, max_examples=60)
@given(cuts=cuts_of, spans=spans_of, gap=st.integers(0, 40))
def test_every_block_is_where_the_table_says(cuts: list[int], spans: list[tuple[int, int]], gap: int) -> None:
    data, memory, inside = made(cuts, spans, gap)
    blocks = Blocks(memory.all, Spans.of(inside))
    expected = [data[at : min(at + BLOCK, span.end)] for span in inside for at in range(span.offset, span.end, BLOCK)]
    assert blocks.counts.tolist() == [-(-span.nbytes // BLOCK) for span in inside]
    assert blocks.nbytes.tolist() == [len(block) for block in expected]
    for row in np.flatnonzero(blocks.whole).tolist():
        assert blocks.address[row] % ALIGNMENT == 0
        assert bytes(view(int(blocks.address[row]), len(expected[row]))) == expected[row]
    gathered = [bytearray(len(block)) for block in expected]
    found = blocks.pieces(np.arange(len(blocks)))
    for row, at, address, nbytes in zip(*(column.tolist() for column in _columns(found)), strict=True):
        gathered[row][at : at + nbytes] = view(address, nbytes)
    assert [bytes(block) for block in gathered] == expected
    assert int(found.nbytes.sum()) == sum(map(len, expected))  # nothing twice, nothing beyond a segment


def _columns(pieces: object) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    return [getattr(pieces, name) for name in ("row", "at", "address", "nbytes")]


@settings(deadline=None, max_examples=30)
@given(cuts=cuts_of, spans=spans_of, gap=st.integers(0, 40))
def test_h62_spans_of_any_order_and_overlap_have_their_digests(
    cuts: list[int], spans: list[tuple[int, int]], gap: int
) -> None:
    data, memory, inside = made(cuts, spans, gap)
    expected = b"".join(reference_digest(data[span.offset : span.end]) for span in inside)
    assert device_digest.digest_spans(memory, inside) == expected
    assert device_digest.digest_leaves([memory.slices(span) for span in inside]) == expected


@settings(deadline=None, max_examples=20)
@given(cuts=cuts_of, gap=st.integers(0, 40), at=st.integers(0, 9), count=st.integers(0, 9))
def test_runs_of_spans_have_the_digests_that_they_have_alone(cuts: list[int], gap: int, at: int, count: int) -> None:
    sizes = [BLOCK, 3, 2 * BLOCK + 7, 0, 40_000, 1, BLOCK, 9, 0, 5]
    data, memory, spans = made(cuts, list(zip(itertools.accumulate([0, *sizes[:-1]]), sizes, strict=True)), gap)
    found = device_digest.SpanDigests(memory, spans).of(at, min(at + count, len(spans)))
    expected = [reference_digest(data[span.offset : span.end]) for span in spans[at : at + count]]
    assert found == b"".join(expected)
    leaves = [Leaf(span, TensorClass.WEIGHT) for span in spans]
    digests = digest.LeafDigests(memory, leaves)
    assert digests.of(range(at, min(at + count, len(spans)))) == found


def test_pieces_that_follow_each_other_are_copied_at_once() -> None:
    memory = space(bytes(4 * BLOCK), [2 * BLOCK], 7)
    blocks = Blocks(memory.all, Spans.of([memory.span]))
    first, second = memory.segments
    runs = list(blocks.pieces(np.arange(4)).runs())
    assert runs == [(0, first.address, 2 * BLOCK), (2 * BLOCK, second.address, 2 * BLOCK)]
    backwards = list(blocks.pieces(np.array([1, 0])).runs())
    assert backwards == [(0, first.address + BLOCK, BLOCK), (BLOCK, first.address, BLOCK)]


def test_no_leaf_and_empty_leaves_are_legal() -> None:
    memory = space(b"abc")
    assert device_digest.digest_spans(memory, []) == b""
    assert device_digest.digest_spans(memory, [Span(1, 0), Span(0, 3), Span(3, 0)]) == b"".join(
        xxhash.xxh3_128_digest(part) for part in (b"", xxhash.xxh64(b"abc").intdigest().to_bytes(8, "little"), b"")
    )


def test_a_span_outside_the_memory_is_refused() -> None:
    with pytest.raises(IndexError):
        device_digest.digest_spans(space(b"abc"), [Span(0, 1), Span(1, 3)])


def test_more_blocks_than_a_batch_holds() -> None:
    nbytes = device_digest.CPU_BATCH_BYTES + 3 * LEAF_BYTES + 5
    data = random.Random(2).randbytes(LEAF_BYTES) * (nbytes // LEAF_BYTES) + bytes(5)
    memory = space(data)
    leaves = [Leaf(Span(at, min(LEAF_BYTES, nbytes - at)), TensorClass.WEIGHT) for at in range(0, nbytes, LEAF_BYTES)]
    assert device_digest.digest_spans(memory, [leaf.span for leaf in leaves]) == digest.digest_leaves(memory, leaves)
