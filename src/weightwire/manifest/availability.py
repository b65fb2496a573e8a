"""Which leaves of a shard its process has: verified, in their final place, written by nobody any more. It only grows.

Whoever fills the shard adds to it (a pull from peers, or a reader of a disk); whoever serves the shard reads it.
"""

from __future__ import annotations

import threading


class Availability:
    """Thread-safe. Leaves are bits, as in ``manifest.leafset``.

    Args:
        leaves: how many there are in the layout.
        have: those that are there from the start.
    """

    def __init__(self, leaves: int, have: int = 0) -> None:
        self.leaves = leaves
        self._all = (1 << leaves) - 1
        self._have = have & self._all
        self._changed = threading.Condition()

    @property
    def have(self) -> int:
        """The leaves that are there."""
        return self._have

    @property
    def version(self) -> int:
        """How many leaves are there; equal versions are equal sets, since a set only grows."""
        return self._have.bit_count()

    @property
    def complete(self) -> bool:
        """Whether all are."""
        return self._have == self._all

    @property
    def fraction(self) -> float:
        """The part of all leaves that is there."""
        return self.version / self.leaves if self.leaves else 1.0

    def add(self, leaves: int) -> None:
        """These are there from now on, for good: their bytes never change while anybody may read this shard."""
        with self._changed:
            self._have |= leaves & self._all
            self._changed.notify_all()

    def covers(self, first: int, count: int) -> bool:
        """Whether leaves ``first`` to ``first + count - 1`` are all there."""
        wanted = (1 << count) - 1
        return self._have == self._all or (self._have >> first) & wanted == wanted

    def wait(self, version: int, timeout: float) -> None:
        """Return once there are more than ``version`` leaves, after ``poke``, or after ``timeout`` seconds."""
        with self._changed:
            if self.version <= version:
                self._changed.wait(timeout)

    def poke(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._changed.notify_all()
