"""A virtual clock and what happens when: nothing here knows what is simulated."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class World:
    """Runs what was entered for later, in order of time; at one time, in order of entry.

    Attributes:
        now: seconds since the beginning.
        events: how many have happened.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._later: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._entered = 0

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        """Call ``do(*args)`` at ``when``, which is not before now."""
        self._entered += 1
        heapq.heappush(self._later, (when, self._entered, do, args))

    def run(self, until: float) -> None:
        """Until nothing is entered any more, or the clock would pass ``until``."""
        later, pop = self._later, heapq.heappop
        while later and later[0][0] <= until:
            self.now, _, do, args = pop(later)
            self.events += 1
            do(*args)

    def stop(self) -> None:
        """Forget whatever was entered."""
        self._later.clear()
