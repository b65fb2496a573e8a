"""Cutting a read into transfers of bounded size. Pure; in arrays, since a shard may have a hundred thousand tensors."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightwire.manifest.address import AddressSpace, Columns, Numbers
from weightwire.types import Span

MAX_BYTES = 32 * 1024 * 1024
"""Of one transfer: over cross-memory attach a transfer blocks until done, and a fence waits for it."""

MAX_DEVICE_BYTES = 256 * 1024 * 1024
"""Of one transfer into a device, which goes on by itself: a fifth of a millisecond on one device, 5 over a network."""

MAX_RUNS = 2048
"""Descriptors of one transfer."""

Rows = npt.NDArray[np.int64]
"""One row for each run: our address, theirs, bytes."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that follow each other on both sides."""

    local: int
    remote: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One transfer: runs between one local and one remote device.

    Attributes:
        local: our device, ``cpu`` or ``cuda:N``.
        remote: theirs.
        rows: at most ``MAX_RUNS`` of them.
        nbytes: of all runs, at most ``MAX_BYTES`` or ``MAX_DEVICE_BYTES``.
    """

    local: str
    remote: str
    rows: Rows
    nbytes: int

    @classmethod
    def of(cls, local: str, remote: str, runs: Sequence[Run]) -> Piece:
        """One of ``runs``, as they are."""
        rows = np.array([(run.local, run.remote, run.nbytes) for run in runs], dtype=np.int64).reshape(-1, 3)
        return cls(local, remote, rows, int(rows[:, 2].sum()))

    @property
    def runs(self) -> list[Run]:
        """The rows as objects."""
        return [Run(*row) for row in self.rows.tolist()]

    def split(self, nbytes: int) -> tuple[Piece, Piece | None]:
        """Its first ``nbytes`` bytes, and the rest if there is one."""
        if nbytes >= self.nbytes:
            return self, None
        ends = np.cumsum(self.rows[:, 2])
        head, rest = _part(self.rows, ends, 0, nbytes), _part(self.rows, ends, nbytes, self.nbytes)
        return Piece(self.local, self.remote, head, nbytes), Piece(self.local, self.remote, rest, self.nbytes - nbytes)


class Joined:
    """Two places of the same logical bytes side by side: made once, for all reads between them.

    Args:
        local: our memory.
        remote: theirs. What only one of both has cannot be read.

    Attributes:
        ways: kinds of memory on both sides that a read may go between.
    """

    def __init__(self, local: AddressSpace, remote: AddressSpace) -> None:
        begin = max(local.span.offset, remote.span.offset)
        self.span = Span(begin, max(0, min(local.span.end, remote.span.end) - begin))
        ours, theirs = local.columns(self.span), remote.columns(self.span)
        self._names = list(itertools.product(ours.devices, theirs.devices))
        self.ways = {(one.partition(":")[0], other.partition(":")[0]) for one, other in self._names}
        begins = np.union1d(ours.offsets, theirs.offsets)
        here, there = _at(ours, begins), _at(theirs, begins)
        sizes = np.diff(begins, append=self.span.end)
        rows = np.column_stack((_addresses(ours, here, begins), _addresses(theirs, there, begins), sizes))
        ways = ours.homes[here] * len(theirs.devices) + theirs.homes[there]
        starts = self._starts(rows, ways)
        self._rows = np.column_stack((rows[starts, :2], np.diff(begins[starts], append=self.span.end)))
        self._begins: list[int] = begins[starts].tolist()
        self._ways: list[int] = ways[starts].tolist()

    def pieces(self, span: Span) -> Iterator[Piece]:
        """What moves the bytes of ``span`` to their places.

        Raises:
            IndexError: ``span`` is not inside both.
        """
        if span.offset < self.span.offset or span.end > self.span.end:
            raise IndexError(f"bytes {span.offset}..{span.end} are outside {self.span.offset}..{self.span.end}")
        if not span.nbytes:
            return
        # Asked between two copies of megabytes, when no code is in cache: a few steps, and of arrays as few as may be.
        first = bisect.bisect_right(self._begins, span.offset) - 1
        last = bisect.bisect_left(self._begins, span.end, first)
        rows = self._rows[first:last].copy()
        rows[-1, 2] = span.end - self._begins[last - 1]
        if before := span.offset - self._begins[first]:
            rows[0] += (before, before, -before)
        at, ways = 0, self._ways[first:last]
        for way, same in itertools.groupby(ways) if len(set(ways)) > 1 else [(ways[0], ways)]:
            local, remote = self._names[way]
            end = at + len(list(same))
            yield from _pieces(local, remote, rows[at:end])
            at = end

    def _starts(self, rows: Rows, ways: Numbers) -> npt.NDArray[np.intp]:
        """Rows that follow each other on both sides are one: here, those that do not follow the one before.

        Not where a device is involved: what follows may be another allocation, which has another key.
        """
        host = np.array([names == ("cpu", "cpu") for names in self._names], dtype=bool)
        follows = (rows[:-1, :2] + rows[:-1, 2:] == rows[1:, :2]).all(axis=1)
        follows &= (ways[:-1] == ways[1:]) & host[ways[1:]]
        return np.flatnonzero(np.append(True, ~follows))[: len(rows)]


def _at(columns: Columns, begins: Numbers) -> npt.NDArray[np.intp]:
    return np.searchsorted(columns.offsets, begins, "right") - 1


def _addresses(columns: Columns, at: npt.NDArray[np.intp], begins: Numbers) -> Numbers:
    return columns.addresses[at] + begins - columns.offsets[at]


def _pieces(local: str, remote: str, rows: Rows) -> Iterator[Piece]:
    most = MAX_BYTES if local == "cpu" else MAX_DEVICE_BYTES
    total = int(rows[:, 2].sum())
    if total <= most and len(rows) <= MAX_RUNS:
        yield Piece(local, remote, rows, total)
        return
    ends = np.cumsum(rows[:, 2])
    begin = 0
    while begin < total:
        first = int(np.searchsorted(ends, begin, "right"))
        until = min(begin + most, int(ends[min(first + MAX_RUNS, len(ends)) - 1]))
        yield Piece(local, remote, _part(rows, ends, begin, until), until - begin)
        begin = until


def _part(rows: Rows, ends: Numbers, begin: int, until: int) -> Rows:
    """Rows of the bytes ``[begin, until)`` of all; ``ends`` are the rows' ends."""
    first, last = np.searchsorted(ends, begin, "right"), np.searchsorted(ends, until, "left")
    part = rows[first : last + 1].copy()
    part[-1, 2] -= ends[last] - until
    part[0] += np.array((1, 1, -1)) * (begin - (ends[first] - rows[first, 2]))
    return part
