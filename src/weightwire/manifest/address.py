"""The binding of a shard: where the bytes of its logical byte string lie in *this* process. Never hashed.

An :class:`AddressSpace` maps logical offsets to memory. Both ends of a transfer hold one of their own over the same
logical offsets, so a request names logical bytes and each side finds its own memory: no peer can name an address.
"""

from __future__ import annotations

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

    @classmethod
    def of(
        cls,
        addresses: Sequence[int],
        sizes: Sequence[int],
        devices: Sequence[str],
        offsets: Sequence[int] | None = None,
    ) -> Columns:
        """Of equally many; ``offsets``: by default each follows the one before, from 0 on."""
        names = tuple(dict.fromkeys(devices))
        number = {device: at for at, device in enumerate(names)}
        where, nbytes = (np.fromiter(each, np.int64, len(sizes)) for each in (addresses, sizes))
        begins = np.cumsum(nbytes) - nbytes if offsets is None else np.fromiter(offsets, np.int64, len(sizes))
        return cls(begins, where, nbytes, np.fromiter(map(number.__getitem__, devices), np.int64, len(sizes)), names)

    def part(self, first: int, last: int) -> Columns:
        """A copy of the segments numbered ``[first, last)``."""
        offsets, addresses = self.offsets[first:last].copy(), self.addresses[first:last].copy()
        return Columns(offsets, addresses, self.sizes[first:last].copy(), self.homes[first:last].copy(), self.devices)

    @property
    def segments(self) -> list[Segment]:
        """As objects, made anew."""
        rows = zip(*(each.tolist() for each in self[:4]), strict=True)
        return [Segment(offset, address, nbytes, self.devices[home]) for offset, address, nbytes, home in rows]


class Spans(NamedTuple):
    """Spans as arrays, for the leaves of a shard, of which there may be a hundred thousand.

    Attributes:
        offsets: logical offsets.
        sizes: in bytes; may be zero.
    """

    offsets: Numbers
    sizes: Numbers

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Spans:
        """Of any spans, in their order."""
        offsets = np.fromiter((span.offset for span in spans), np.int64, len(spans))
        return cls(offsets, np.fromiter((span.nbytes for span in spans), np.int64, len(spans)))

    @property
    def hull(self) -> Span:
        """From the first to the last byte of those that have any.

        Raises:
            IndexError: one has less than none.
        """
        if np.any(self.sizes < 0):
            raise IndexError("a span of less than no bytes")
        filled = self.sizes > 0
        if not np.any(filled):
            return Span(0, 0)
        offset = int(self.offsets[filled].min())
        return Span(offset, int((self.offsets + self.sizes)[filled].max()) - offset)


class AddressSpace:
    """Segments that cover ``[start, end)`` of a logical byte string without a gap, and what keeps them alive.

    Immutable. The memory stays valid while the object lives, because it holds the tensors.

    Args:
        segments: ascending by offset, each beginning where the one before ends. Arrays are kept, not copied.
        regions: the allocations that all segments lie in, disjoint.
        owners: whatever keeps the memory alive (tensors, storages).

    Raises:
        ValueError: segments that do not follow each other (a programmer's error).
    """

    def __init__(self, segments: Sequence[Segment] | Columns, regions: Sequence[Region], owners: object) -> None:
        if not isinstance(segments, Columns):
            segments = Columns.of(
                [each.address for each in segments],
                [each.nbytes for each in segments],
                [each.device for each in segments],
                [each.offset for each in segments],
            )
        self._columns = segments
        offsets, sizes = self._columns.offsets, self._columns.sizes
        wrong = np.flatnonzero(offsets[:-1] + sizes[:-1] != offsets[1:])
        if len(wrong):
            raise ValueError(f"segments do not follow each other at offset {offsets[wrong[0] + 1]}")
        self.span = Span(int(offsets[0]), int(offsets[-1] + sizes[-1] - offsets[0])) if len(offsets) else Span(0, 0)
        """What is covered; zero bytes at offset 0 for an empty space."""
        self.regions = tuple(regions)
        self.owners = owners

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All of them as objects, made anew: not for every read of a large shard."""
        return tuple(self._columns.segments)

    @property
    def all(self) -> Columns:
        """All of them as arrays, only to be read."""
        return self._columns

    def devices(self, span: Span | None = None) -> set[str]:
        """Where the bytes of ``span`` (all by default) lie.

        Raises:
            IndexError: ``span`` is not inside this space.
        """
        used = self._columns if span is None else self.columns(span)
        return {used.devices[home] for home in np.unique(used.homes)}

    def lies_as(self, other: AddressSpace) -> bool:
        """Whether every logical byte of both lies at the same place."""
        mine, theirs = self._columns, other._columns
        return mine.devices == theirs.devices and all(map(np.array_equal, mine[:4], theirs[:4]))

    def columns(self, span: Span) -> Columns:
        """``slices`` as arrays, which are the caller's own.

        Raises:
            IndexError: ``span`` is not inside this space.
        """
        if span.nbytes == 0:
            return self._columns.part(0, 0)
        self.check(span)
        offsets = self._columns.offsets
        first = int(np.searchsorted(offsets, span.offset, "right")) - 1
        part = self._columns.part(first, int(np.searchsorted(offsets, span.end, "left")))
        before = span.offset - part.offsets[0]
        part.offsets[0] += before
        part.addresses[0] += before
        part.sizes[0] -= before
        part.sizes[-1] = span.end - part.offsets[-1]
        return part

    def check(self, span: Span) -> None:
        """Raise ``IndexError`` if ``span`` is not inside this space."""
        if span.nbytes < 0 or span.offset < self.span.offset or span.end > self.span.end:
            raise IndexError(f"bytes {span.offset}..{span.end} are outside {self.span.offset}..{self.span.end}")

    def slices(self, span: Span) -> list[Segment]:
        """The memory of ``span``, in logical order.

        Raises:
            IndexError: ``span`` is not inside this space.
        """
        return self.columns(span).segments
