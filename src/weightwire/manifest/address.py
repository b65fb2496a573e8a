"""The binding of a shard: where the bytes of its logical byte string lie in *this* process. Never hashed.

An :class:`AddressSpace` maps logical offsets to memory. Both ends of a transfer hold one of their own over the same
logical offsets, so a request names logical bytes and each side finds its own memory: no peer can name an address.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from weightwire.types import Span

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of logical bytes that is also a run of memory.

    Attributes:
        offset: logical offset of its first byte.
        address: address of its first byte.
        nbytes: its length, more than zero.
        device: ``cpu`` or ``cuda:N``.
    """

    offset: int
    address: int
    nbytes: int
    device: str


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A whole allocation that segments lie in; what a transport registers (never single tensors)."""

    address: int
    nbytes: int
    device: str


class Columns(NamedTuple):
    """Segments as arrays, in logical order: for shards of so many tensors that an object for each would be felt.

    Attributes:
        offsets: logical offsets.
        addresses: where the bytes are.
        sizes: in bytes.
        homes: index into ``devices`` of each.
        devices: ``cpu``, ``cuda:N``.
    """

    offsets: Numbers
    addresses: Numbers
    sizes: Numbers
    homes: Numbers
    devices: tuple[str, ...]

    def part(self, first: int, last: int) -> Columns:
        """A copy of the segments numbered ``[first, last)``."""
        offsets, addresses = self.offsets[first:last].copy(), self.addresses[first:last].copy()
        return Columns(offsets, addresses, self.sizes[first:last].copy(), self.homes[first:last].copy(), self.devices)


class AddressSpace:
    """Segments that cover ``[start, end)`` of a logical byte string without a gap, and what keeps them alive.

    Immutable. The memory stays valid while the object lives, because it holds the tensors.

    Args:
        segments: ascending by offset, each beginning where the one before ends.
        regions: the allocations that all segments lie in, disjoint.
        owners: whatever keeps the memory alive (tensors, storages).

    Raises:
        ValueError: segments that do not follow each other (a programmer's error).
    """

    def __init__(self, segments: Sequence[Segment], regions: Sequence[Region], owners: object) -> None:
        for before, after in itertools.pairwise(segments):
            if before.offset + before.nbytes != after.offset:
                raise ValueError(f"segments do not follow each other at offset {after.offset}")
        self.segments = tuple(segments)
        self.regions = tuple(regions)
        self.owners = owners
        self._offsets = [segment.offset for segment in self.segments]

    @property
    def span(self) -> Span:
        """What is covered; zero bytes at offset 0 for an empty space."""
        if not self.segments:
            return Span(0, 0)
        last = self.segments[-1]
        return Span(self.segments[0].offset, last.offset + last.nbytes - self.segments[0].offset)

    def columns(self, span: Span) -> Columns:
        """``slices`` as arrays, which are the caller's own.

        Raises:
            IndexError: ``span`` is not inside this space.
        """
        if span.nbytes == 0:
            return self._columns.part(0, 0)
        self.check(span)
        first = bisect.bisect_right(self._offsets, span.offset) - 1
        part = self._columns.part(first, bisect.bisect_left(self._offsets, span.end, first))
        before = span.offset - part.offsets[0]
        part.offsets[0] += before
        part.addresses[0] += before
        part.sizes[0] -= before
        part.sizes[-1] = span.end - part.offsets[-1]
        return part

    @functools.cached_property
    def _columns(self) -> Columns:
        devices = tuple(dict.fromkeys(segment.device for segment in self.segments))
        home = {device: at for at, device in enumerate(devices)}
        rows = [(s.offset, s.address, s.nbytes, home[s.device]) for s in self.segments]
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return Columns(table[:, 0], table[:, 1], table[:, 2], table[:, 3], devices)

    def check(self, span: Span) -> None:
        """Raise ``IndexError`` if ``span`` is not inside this space."""
        if span.nbytes < 0 or span.offset < self.span.offset or span.end > self.span.end:
            raise IndexError(f"bytes {span.offset}..{span.end} are outside {self.span.offset}..{self.span.end}")

    def slices(self, span: Span) -> list[Segment]:
        """The memory of ``span``, in logical order.

        Raises:
            IndexError: ``span`` is not inside this space.
        """
        if span.nbytes == 0:
            return []
        self.check(span)
        found = []
        at = bisect.bisect_right(self._offsets, span.offset) - 1
        while at < len(self.segments) and self.segments[at].offset < span.end:
            found.append(_clip(self.segments[at], span))
            at += 1
        return found


def _clip(segment: Segment, span: Span) -> Segment:
    begin = max(segment.offset, span.offset)
    end = min(segment.offset + segment.nbytes, span.end)
    return Segment(begin, segment.address + begin - segment.offset, end - begin, segment.device)
