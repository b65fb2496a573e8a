"""Cutting a read into transfers of bounded size. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from weightwire.manifest.address import Segment

MAX_BYTES = 32 * 1024 * 1024
"""Of one transfer: over cross-memory attach a transfer blocks until done, and a fence waits for it."""

MAX_DEVICE_BYTES = 256 * 1024 * 1024
"""Of one transfer into a device, which goes on by itself: a fifth of a millisecond on one device, 5 over a network."""

MAX_RUNS = 2048
"""Descriptors of one transfer."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that follow each other on both sides."""

    local: int
    remote: int
    nbytes: int


@dataclass(slots=True)
class Piece:
    """One transfer: runs between one local and one remote device.

    Attributes:
        local: our device, ``cpu`` or ``cuda:N``.
        remote: theirs.
        runs: at most ``MAX_RUNS``, together at most ``most``.
    """

    local: str
    remote: str
    runs: list[Run] = field(default_factory=list)
    nbytes: int = 0

    @property
    def most(self) -> int:
        """Bytes that it may hold."""
        return MAX_BYTES if self.local == "cpu" else MAX_DEVICE_BYTES

    def takes(self, local: Segment, remote: Segment) -> bool:
        """Whether another run between these two fits in."""
        room = self.nbytes < self.most and len(self.runs) < MAX_RUNS
        return room and (self.local, self.remote) == (local.device, remote.device)

    def add(self, run: Run) -> None:
        """Append ``run``, joined to the last one where they follow each other on both sides.

        Not where a device is involved: what follows may be another allocation, which has another key.
        """
        self.nbytes += run.nbytes
        last = self.runs[-1] if self.runs and self.local == self.remote == "cpu" else None
        if last and last.local + last.nbytes == run.local and last.remote + last.nbytes == run.remote:
            self.runs[-1] = Run(last.local, last.remote, last.nbytes + run.nbytes)
        else:
            self.runs.append(run)

    def split(self, nbytes: int) -> tuple[Piece, Piece | None]:
        """Its first ``nbytes`` bytes, and the rest if there is one."""
        head, left = Piece(self.local, self.remote), Piece(self.local, self.remote)
        for run in self.runs:
            now = min(run.nbytes, nbytes - head.nbytes)
            if now:
                head.add(Run(run.local, run.remote, now))
            if now < run.nbytes:
                left.add(Run(run.local + now, run.remote + now, run.nbytes - now))
        return head, left if left.runs else None


def cut(local: Sequence[Segment], remote: Sequence[Segment]) -> Iterator[Piece]:
    """Pieces that move the bytes of ``remote`` to ``local``; both hold the same logical bytes, in order."""
    ours, theirs = iter(local), iter(remote)
    to, source = next(ours, None), next(theirs, None)
    piece: Piece | None = None
    while to is not None and source is not None:
        if piece is None or not piece.takes(to, source):
            if piece is not None:
                yield piece
            piece = Piece(to.device, source.device)
        nbytes = min(to.nbytes, source.nbytes, piece.most - piece.nbytes)
        piece.add(Run(to.address, source.address, nbytes))
        to, source = _rest(to, nbytes) or next(ours, None), _rest(source, nbytes) or next(theirs, None)
    if piece is not None:
        yield piece


def _rest(segment: Segment, used: int) -> Segment | None:
    if segment.nbytes == used:
        return None
    return Segment(segment.offset + used, segment.address + used, segment.nbytes - used, segment.device)
