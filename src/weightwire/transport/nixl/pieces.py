"""Cutting a read into transfers of bounded size. Pure; in arrays, since a shard may have a hundred thousand tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightwire.manifest.address import Columns, Numbers

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


def cut(local: Columns, remote: Columns) -> Iterator[Piece]:
    """Pieces that move the bytes of ``remote`` to ``local``; both hold the same logical bytes."""
    if not len(local.offsets):
        return
    end = local.offsets[-1] + local.sizes[-1]
    begins = np.union1d(local.offsets, remote.offsets)
    ours, theirs = _at(local, begins), _at(remote, begins)
    rows = np.column_stack((_addresses(local, ours, begins), _addresses(remote, theirs, begins), _sizes(begins, end)))
    pairs = local.homes[ours] * len(remote.devices) + remote.homes[theirs]
    for same in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(pairs)) + 1):
        to, source = divmod(int(pairs[same[0]]), len(remote.devices))
        yield from _pieces(local.devices[to], remote.devices[source], rows[same[0] : same[-1] + 1])


def _at(columns: Columns, begins: Numbers) -> npt.NDArray[np.intp]:
    return np.searchsorted(columns.offsets, begins, "right") - 1


def _addresses(columns: Columns, at: npt.NDArray[np.intp], begins: Numbers) -> Numbers:
    return columns.addresses[at] + begins - columns.offsets[at]


def _sizes(begins: Numbers, end: int) -> Numbers:
    return np.diff(begins, append=end)


def _pieces(local: str, remote: str, rows: Rows) -> Iterator[Piece]:
    rows = _one_run_each(rows) if local == remote == "cpu" else rows
    most = MAX_BYTES if local == "cpu" else MAX_DEVICE_BYTES
    ends = np.cumsum(rows[:, 2])
    begin, total = 0, int(ends[-1])
    while begin < total:
        first = int(np.searchsorted(ends, begin, "right"))
        until = min(begin + most, int(ends[min(first + MAX_RUNS, len(ends)) - 1]))
        yield Piece(local, remote, _part(rows, ends, begin, until), until - begin)
        begin = until


def _one_run_each(rows: Rows) -> Rows:
    """Rows that follow each other on both sides are one.

    Not where a device is involved: what follows may be another allocation, which has another key.
    """
    follows = (rows[:-1, :2] + rows[:-1, 2:] == rows[1:, :2]).all(axis=1)
    starts = np.flatnonzero(np.append(True, ~follows))
    return np.column_stack((rows[starts, :2], np.add.reduceat(rows[:, 2], starts)))


def _part(rows: Rows, ends: Numbers, begin: int, until: int) -> Rows:
    """Rows of the bytes ``[begin, until)`` of all; ``ends`` are the rows' ends."""
    first, last = np.searchsorted(ends, begin, "right"), np.searchsorted(ends, until, "left")
    part = rows[first : last + 1].copy()
    part[-1, 2] -= ends[last] - until
    part[0] += np.array((1, 1, -1)) * (begin - (ends[first] - rows[first, 2]))
    return part
