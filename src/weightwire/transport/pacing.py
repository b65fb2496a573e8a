"""Keeping to a rate: a token bucket as a pure core, and a pacer that many threads wait by.

Who wants to send reserves a piece and waits for its turn. Turns are given in the order in which they are asked for, and
a piece is small, so connections that always want more get equal parts, and none of them waits for long at a time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

PIECE_S = 0.01
"""What one piece takes at the whole rate."""

MIN_PIECE = 16 * 1024
MAX_PIECE = 4 * 1024 * 1024

BURST_S = 0.05
"""How far behind its rate a pacer may be and still catch up: what threads that are woken late lose."""

NAP_S = 0.05
"""Longest that a wait goes on without asking whether it still has a purpose."""


class Bucket:
    """When the next bytes may go. Pure: the caller tells the time. Not thread-safe.

    Over any stretch of ``t`` seconds at most ``rate * (t + burst_s)`` bytes, and one piece, have their turn.

    Args:
        rate: bytes a second, more than 0.
        burst_s: see ``BURST_S``.
    """

    def __init__(self, rate: float, burst_s: float = BURST_S) -> None:
        self.rate = rate
        self._burst_s = burst_s
        self._next = -math.inf

    def reserve(self, nbytes: int, now: float) -> float:
        """The time from which ``nbytes`` may go; in the past where they may go at once."""
        turn = max(self._next, now - self._burst_s)
        self._next = turn + nbytes / self.rate
        return turn


class Pacer:
    """A bucket that threads share, and their waiting. Thread-safe.

    Args:
        rate: bytes a second; 0 for no bound, and then nothing ever waits.
        clock: monotonic seconds.
        waited: told the seconds of every wait, from the thread that waited.
    """

    def __init__(
        self,
        rate: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[float], None] | None = None,
    ) -> None:
        self._clock = clock
        self._waited = waited
        self._lock = threading.Lock()
        self._bucket = Bucket(max(rate, 1.0))
        self._rate = rate

    @property
    def rate(self) -> float:
        """Bytes a second; 0 for no bound. May be set at any time: turns that were given already stay."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        with self._lock:
            self._rate = rate
            self._bucket.rate = max(rate, 1.0)

    @property
    def piece(self) -> int:
        """How many bytes to reserve at a time, at most."""
        return max(MIN_PIECE, min(int(self._rate * PIECE_S), MAX_PIECE))

    def reserve(self, nbytes: int) -> float:
        """The turn of ``nbytes``, for ``due`` and ``hold``; it is lost where it is not used."""
        if not self._rate:
            return -math.inf
        with self._lock:
            return self._bucket.reserve(nbytes, self._clock())

    def due(self, turn: float) -> bool:
        """Whether a turn has come."""
        return turn <= self._clock()

    def hold(self, turn: float, rest: Callable[[float], bool]) -> bool:
        """Wait for ``turn``; false if ``rest`` ended the wait.

        Args:
            turn: of ``reserve``.
            rest: sleeps for at most the seconds that it is given (never more than ``NAP_S``), and says whether to give
                up; ``threading.Event().wait`` is one.
        """
        began = self._clock()
        left = turn - began
        if left <= 0:
            return True
        while left > 0:
            if rest(min(left, NAP_S)):
                break
            left = turn - self._clock()
        if self._waited is not None:
            self._waited(self._clock() - began)
        return left <= 0
