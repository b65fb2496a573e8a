"""Reads that keep to what a source grants, where the source cannot: its memory is read one-sided.

The source says how many bytes a second this reader may take (``ReadGrant.rate``, then ``ProgressUpdate.rate``). All
connections under one lease share one pacer, and a long read goes out in pieces.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from weightwire.errors import PeerStalled
from weightwire.transport.base import Connection, Read, Registration
from weightwire.transport.pacing import Pacer
from weightwire.types import Span

SLOWEST_RATE = 1024 * 1024
"""Bytes a second below which a peer counts as stalled (added to the stall bound for what is outstanding)."""

STALL_BYTES = 64 * 1024 * 1024
"""Most outstanding bytes that lengthen the stall bound: where reads have grown beyond, the link is a fast one."""


def patience_s(stall_s: float, outstanding: int, granted: float = 0.0) -> float:
    """How long to wait for the first of ``outstanding`` bytes under way: twice what the peer's cap makes of them.

    Args:
        stall_s: seconds without a finished read after which a peer is dropped.
        outstanding: bytes asked for on one connection and not there yet.
        granted: bytes a second that the peer lets this connection take; 0: as many as it can.
    """
    usual = stall_s + min(outstanding, STALL_BYTES) / SLOWEST_RATE
    return max(usual, stall_s + 2 * outstanding / granted) if granted else usual


class PacedRead:
    """One read; see :class:`~weightwire.transport.base.Read`. ``wait`` starts what is not started yet."""

    def __init__(self, connection: PacedConnection, into: Registration, pieces: int) -> None:
        self._connection = connection
        self.into = into
        self.unstarted = pieces
        self.started: deque[Read] = deque()

    def wait(self, deadline: float) -> None:
        """Finish this read, and all before it."""
        self._connection.finish(self, deadline)


class PacedConnection:
    """A :class:`~weightwire.transport.base.Connection` that takes its turns with ``pacer``.

    Where the pacer is not the narrowest place, a read is started as a whole at once, as without it.

    Args:
        inner: carries the bytes; owned from now on.
        pacer: shared by all connections under one lease.
    """

    def __init__(self, inner: Connection, pacer: Pacer) -> None:
        self._inner = inner
        self._pacer = pacer
        self._fenced = threading.Event()
        self._unstarted: deque[tuple[PacedRead, Span]] = deque()
        self._turn: float | None = None  # of the first piece in ``_unstarted``, once it was asked for

    @property
    def path(self) -> str:
        """The inner one's."""
        return self._inner.path

    @property
    def depth(self) -> int:
        """The inner one's."""
        return self._inner.depth

    def read(self, span: Span, into: Registration) -> PacedRead:
        """See the contract."""
        into.memory.check(span)  # IndexError before anything is asked for
        pieces = _cut(span, self._pacer.piece)
        read = PacedRead(self, into, len(pieces))
        self._unstarted.extend((read, piece) for piece in pieces)
        self._start_due()
        return read

    def finish(self, read: PacedRead, deadline: float) -> None:
        """Start and finish pieces in order until ``read`` is in place; what ``PacedRead.wait`` does.

        Raises:
            PeerStalled: not by ``deadline``; it can be waited for again.
        """
        while True:
            self._start_due()
            while read.started:
                read.started[0].wait(deadline)
                read.started.popleft()
            if not read.unstarted:
                return
            assert self._turn is not None
            self._pacer.hold(self._turn, lambda seconds: self._rest(seconds, deadline))
            if time.monotonic() >= deadline:
                raise PeerStalled("a read was not done in time at the rate that the source grants", "read elsewhere")

    def fence(self, deadline: float) -> None:
        """See the contract; a thread that waits for its turn wakes at once."""
        self._fenced.set()
        self._inner.fence(deadline)

    def _rest(self, seconds: float, deadline: float) -> bool:
        left = deadline - time.monotonic()
        return self._fenced.wait(max(0.0, min(seconds, left))) or left <= seconds

    def _start_due(self) -> None:
        while self._unstarted:
            read, piece = self._unstarted[0]
            if self._turn is None:
                self._turn = self._pacer.reserve(piece.nbytes)
            if not self._fenced.is_set() and not self._pacer.due(self._turn):
                return
            read.started.append(self._inner.read(piece, read.into))  # raises where it was fenced
            read.unstarted -= 1
            self._unstarted.popleft()
            self._turn = None


def _cut(span: Span, piece: int) -> list[Span]:
    starts = range(span.offset, span.end, piece) or [span.offset]
    return [Span(at, min(piece, span.end - at)) for at in starts]
