"""Which 64 KiB blocks leaves consist of and where each lies: whole tables at a time, no work per block in Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightwire.manifest.address import Columns, Spans
from weightwire.manifest.records import BLOCK_BYTES

ALIGNMENT = 16
"""What the address of a block must be a multiple of to be hashed where it lies."""

Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Parts of blocks that are a run of memory each; at most a block long.

    Attributes:
        row: place of its block among those asked for.
        at: offset in the block.
        address: of its first byte.
        nbytes: its length.
    """

    row: Column
    at: Column
    address: Column
    nbytes: Column

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """``(offset, address, nbytes)`` of pieces joined where they follow each other, blocks one after the other."""
        to = self.row * BLOCK_BYTES + self.at
        breaks = (to[1:] != to[:-1] + self.nbytes[:-1]) | (self.address[1:] != self.address[:-1] + self.nbytes[:-1])
        first = np.flatnonzero(np.concatenate(([True], breaks)))
        nbytes = np.add.reduceat(self.nbytes, first)
        yield from zip(to[first].tolist(), self.address[first].tolist(), nbytes.tolist(), strict=True)


class Blocks:
    """The blocks of some spans, span after span.

    Args:
        segments: memory of at least these spans, without a gap inside a span.
        spans: any, in the order wanted.

    Attributes:
        counts: blocks of each span; none for an empty one.
        nbytes: of each block, 1 to ``BLOCK_BYTES``.
        address: of each block's first byte.
        whole: whether it is one run of memory and aligned, so that it can be hashed where it lies.
    """

    def __init__(self, segments: Columns, spans: Spans) -> None:
        self._offset, self._address = segments.offsets, segments.addresses
        self._end = segments.offsets + segments.sizes
        begin, size = spans
        self.counts = -(-size // BLOCK_BYTES)
        number = _within(self.counts) * BLOCK_BYTES
        self._begin = np.repeat(begin, self.counts) + number
        self.nbytes = np.minimum(np.repeat(size, self.counts) - number, BLOCK_BYTES)
        home = self._homes(begin, size)
        self.address = self._begin + (self._address - self._offset)[home]
        self.whole = (self._begin + self.nbytes <= self._end[home]) & (self.address % ALIGNMENT == 0)

    def _homes(self, begin: Column, size: Column) -> Column:
        """Number of the segment that each block begins in; asked for block by block only where a span has several."""
        first = self._home(begin)
        found = np.repeat(first, self.counts)
        several = np.repeat((size > 0) & (self._home(begin + size - 1) != first), self.counts)
        found[several] = self._home(self._begin[several])
        return found

    def __len__(self) -> int:
        return len(self.nbytes)

    def pieces(self, rows: Column) -> Pieces:
        """The pieces of the blocks numbered ``rows``, in their order."""
        begin, end = self._begin[rows], self._begin[rows] + self.nbytes[rows]
        first = self._home(begin)
        counts = self._home(end - 1) - first + 1
        home = np.repeat(first, counts) + _within(counts)
        row = np.repeat(np.arange(len(rows)), counts)
        start = np.maximum(begin[row], self._offset[home])
        stop = np.minimum(end[row], self._end[home])
        return Pieces(row, start - begin[row], self._address[home] + start - self._offset[home], stop - start)

    def _home(self, offset: Column) -> Column:
        """Number of the segment that each offset lies in."""
        found: Column = np.searchsorted(self._offset, offset, side="right") - 1
        return found


def _within(counts: Column) -> Column:
    """0, 1, … for each count, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)
