"""How a shard's logical byte string is cut into leaves, and leaves are grouped into chunks. Pure functions.

The leaf rule is part of the protocol (``records.FORMAT``): it decides content ids. The chunk rule is a mere setting:
it enters no id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from weightwire.manifest.collection import no_collection
from weightwire.manifest.records import Entry, Layout, Leaf
from weightwire.types import Span, TensorClass

LEAF_BYTES = 1 << 20
"""The most bytes that one leaf covers."""

CHUNKS_PER_SHARD = 1000
MIN_CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 16 << 20


def canonical_order(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Weight before derived; in each class large entries (``>= LEAF_BYTES``) before small ones; then by name."""
    return tuple(sorted(entries, key=_rank))


@no_collection()
def cut(entries: Sequence[Entry]) -> tuple[Leaf, ...]:
    """The leaves of ``entries``, which are in canonical order.

    A large entry begins a leaf of its own and is cut every ``LEAF_BYTES``; small entries are packed whole, in order,
    until the next does not fit or the class changes. Offsets add up without padding; zero-byte entries add nothing.
    """
    return tuple(_leaves(entries))


def count_leaves(entries: Sequence[Entry]) -> int:
    """``len(cut(entries))`` without making a leaf: safe for sizes that a stranger claims."""
    count, packed, kind = 0, 0, None
    for entry in entries:
        if entry.nbytes >= LEAF_BYTES:
            count, packed = count + -(-entry.nbytes // LEAF_BYTES), 0
        elif entry.nbytes:
            if not packed or entry.kind is not kind or packed + entry.nbytes > LEAF_BYTES:
                count, packed = count + 1, 0
            packed += entry.nbytes
        kind = entry.kind if entry.nbytes else kind
    return count


def chunk_bytes(total: int) -> int:
    """How many bytes a chunk of a shard of ``total`` bytes has: about a thousandth, 1 to 16 MiB, whole leaves."""
    leaves = -(-total // (CHUNKS_PER_SHARD * LEAF_BYTES))
    return min(max(leaves * LEAF_BYTES, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)


def chunks(layout: Layout, size: int | None = None) -> tuple[range, ...]:
    """Runs of leaf indices of one class and at most ``size`` bytes (at least one leaf), in order.

    Args:
        layout: what is cut.
        size: bytes per chunk; ``chunk_bytes(layout.nbytes)`` by default.
    """
    limit = chunk_bytes(layout.nbytes) if size is None else size
    leaves, found, start = layout.leaves, [], 0
    for at in range(1, len(leaves) + 1):
        if at == len(leaves) or not _joins(leaves[start], leaves[at], limit):
            found.append(range(start, at))
            start = at
    return tuple(found)


def chunk_span(layout: Layout, chunk: range) -> Span:
    """The bytes of a run of leaf indices, which is not empty."""
    first, last = layout.leaves[chunk[0]].span, layout.leaves[chunk[-1]].span
    return Span(first.offset, last.end - first.offset)


def _rank(entry: Entry) -> tuple[bool, bool, str]:
    return (entry.kind is not TensorClass.WEIGHT, entry.nbytes < LEAF_BYTES, entry.name)


def _leaves(entries: Sequence[Entry]) -> Iterator[Leaf]:
    offset = 0  # of the next byte that is in no leaf yet
    packed, kind = 0, TensorClass.WEIGHT  # the open leaf of small entries
    for entry in entries:
        if packed and (entry.nbytes >= LEAF_BYTES or entry.kind is not kind or packed + entry.nbytes > LEAF_BYTES):
            yield Leaf(Span(offset, packed), kind)
            offset, packed = offset + packed, 0
        if entry.nbytes >= LEAF_BYTES:
            for begin in range(0, entry.nbytes, LEAF_BYTES):
                yield Leaf(Span(offset + begin, min(LEAF_BYTES, entry.nbytes - begin)), entry.kind)
            offset += entry.nbytes
        else:
            packed, kind = packed + entry.nbytes, entry.kind if entry.nbytes else kind
    if packed:
        yield Leaf(Span(offset, packed), kind)


def _joins(first: Leaf, following: Leaf, limit: int) -> bool:
    return first.kind is following.kind and following.span.end - first.span.offset <= limit
