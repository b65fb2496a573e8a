from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weightwire.manifest.leaves import (
    LEAF_BYTES,
    MAX_CHUNK_BYTES,
    canonical_order,
    chunk_bytes,
    chunk_span,
    chunks,
    count_leaves,
    cut,
)
from weightwire.manifest.records import Entry, Layout
from weightwire.types import TensorClass

WEIGHT, DERIVED = TensorClass.WEIGHT, TensorClass.DERIVED


def entry(name: str, nbytes: int, kind: TensorClass = WEIGHT) -> Entry:
    return Entry(name=name, dtype="uint8", shape=(nbytes,), order=(0,), kind=kind, nbytes=nbytes)


sizes = st.one_of(
    st.integers(0, 5000), st.integers(0, 3 * LEAF_BYTES), st.sampled_from([LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1])
)
some_entries = st.lists(st.tuples(sizes, st.sampled_from([WEIGHT, DERIVED])), max_size=40).map(
    lambda parts: canonical_order(entry(f"t{i}", nbytes, kind) for i, (nbytes, kind) in enumerate(parts))
)


def test_order_is_class_then_size_then_name() -> None:
    given_ = [
        entry("b", 5),
        entry("a", LEAF_BYTES, DERIVED),
        entry("z", LEAF_BYTES),
        entry("a2", 0),
        entry("c", 9, DERIVED),
        entry("y", 3 * LEAF_BYTES),
    ]
    assert [e.name for e in canonical_order(given_)] == ["y", "z", "a2", "b", "a", "c"]


def test_large_entries_are_cut_and_small_ones_packed_whole() -> None:
    half = LEAF_BYTES // 2
    parts = [entry("a", 2 * LEAF_BYTES + 3), entry("b", half), entry("c", half), entry("d", 1), entry("e", 7, DERIVED)]
    leaves = cut(canonical_order(parts))
    assert [leaf.span.nbytes for leaf in leaves] == [LEAF_BYTES, LEAF_BYTES, 3, LEAF_BYTES, 1, 7]
    assert [leaf.kind for leaf in leaves] == [WEIGHT] * 5 + [DERIVED]


@given(some_entries)
def test_leaves_cover_every_byte_once_in_order(entries: tuple[Entry, ...]) -> None:
    leaves = cut(entries)
    assert count_leaves(entries) == len(leaves)
    at = 0
    for leaf in leaves:
        assert leaf.span.offset == at
        assert 0 < leaf.span.nbytes <= LEAF_BYTES
        at = leaf.span.end
    assert at == sum(e.nbytes for e in entries)


@given(some_entries)
def test_small_entries_lie_in_one_leaf_and_classes_are_not_mixed(entries: tuple[Entry, ...]) -> None:
    leaves, at = cut(entries), 0
    for one in (e for e in entries if e.nbytes):
        inside = [leaf for leaf in leaves if leaf.span.offset < at + one.nbytes and leaf.span.end > at]
        assert all(leaf.kind is one.kind for leaf in inside)
        if one.nbytes >= LEAF_BYTES:
            assert inside[0].span.offset == at
            assert inside[-1].span.end == at + one.nbytes
        else:
            assert len(inside) == 1
        at += one.nbytes


@given(some_entries, st.none() | st.integers(1, 20 * LEAF_BYTES))
def test_chunks_are_runs_of_one_class_that_cover_all_leaves(entries: tuple[Entry, ...], size: int | None) -> None:
    layout = Layout(entries=entries)
    runs = chunks(layout, size)
    assert [leaf for run in runs for leaf in run] == list(range(len(layout.leaves)))
    limit = size if size is not None else chunk_bytes(layout.nbytes)
    for run in runs:
        assert len({layout.leaves[leaf].kind for leaf in run}) == 1
        span = chunk_span(layout, run)
        assert span.nbytes == sum(layout.leaves[leaf].span.nbytes for leaf in run)
        assert span.nbytes <= limit or len(run) == 1


@given(st.integers(0, 1 << 45))
def test_chunk_bytes_is_about_a_thousandth(total: int) -> None:
    size = chunk_bytes(total)
    assert size % LEAF_BYTES == 0
    assert LEAF_BYTES <= size <= MAX_CHUNK_BYTES
    assert size in (LEAF_BYTES, MAX_CHUNK_BYTES) or abs(size - total / 1000) <= LEAF_BYTES


def test_counting_leaves_needs_no_memory_for_a_claimed_size() -> None:
    assert count_leaves([entry("huge", 1 << 60)]) == 1 << 40
