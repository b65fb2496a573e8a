"""Digests of what has arrived, computed by a thread of their own while the next bytes come in on another core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from weightwire.target.bounce import Bounce
from weightwire.target.schedule import Flight

BEHIND = 2
"""Flights that may wait for their digests: what arrived longer ago is in no cache any more."""

Check = Callable[[Flight, Bounce | None, float], None]
"""A flight, its bounce buffer if it has one, and how long its lane waited for the wire."""


class Checks:
    """What one lane has received, checked in that order in one thread. A context manager, used by one thread.

    Leaving it waits for all checks: the memory may then be refilled or freed, and what had come before the lane ended,
    for whatever reason, counts.

    Args:
        check: accepts a flight, or sees to it that its peer is dropped. What it raises is raised by a later call here.
    """

    def __init__(self, check: Check) -> None:
        self._check = check
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()

    def add(self, flight: Flight, bounce: Bounce | None, wire_s: float) -> None:
        """Check ``flight`` soon; returns once at most ``BEHIND`` are waiting."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="weightwire-digest")
        self._pending.append(self._pool.submit(self._check, flight, bounce, wire_s))
        while len(self._pending) > BEHIND or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        del self._check  # it is its lane's: memory must not wait for the collector of cycles
        while self._pending:
            self._pending.popleft().result()
