"""Which leaves of a shard that is being loaded are final: pure bookkeeping, no memory, no threads.

A *tensor* is final when whoever fills it says so: all its parts were written, and nothing writes it again. A *leaf* is
final when every entry that has bytes in it is. Nothing is ever guessed: what nobody declared is final at the end.
"""

from __future__ import annotations

from collections.abc import Iterable

from weightwire.manifest.records import Layout
from weightwire.types import TensorClass


class Finality:
    """Of one load of one shard. Not thread-safe.

    Derived entries, and entries whose names nobody declares, are final once ``rest`` was called.

    Args:
        layout: of the shard.
    """

    def __init__(self, layout: Layout) -> None:
        self._names: dict[str, str] = {}
        self._leaves: dict[str, range] = {}
        self._waiting = [0] * len(layout.leaves)  # entries that are not final, by leaf
        offset, leaf = 0, 0
        for entry in layout.entries:
            end = offset + entry.nbytes
            while leaf < len(self._waiting) and layout.leaves[leaf].span.end <= offset:
                leaf += 1
            last = leaf
            while entry.nbytes and layout.leaves[last].span.end < end:
                last += 1
            self._leaves[entry.name] = range(leaf, last + 1) if entry.nbytes else range(0)
            for index in self._leaves[entry.name]:
                self._waiting[index] += 1
            if entry.kind is TensorClass.WEIGHT:
                self._names |= dict.fromkeys((entry.name, *entry.aliases), entry.name)
            offset = end

    @property
    def open(self) -> int:
        """How many leaves are not final."""
        return sum(count > 0 for count in self._waiting)

    def final(self, names: Iterable[str]) -> list[int]:
        """These tensors are final; leaves that are final now and were not before, ascending.

        Args:
            names: of entries, or their aliases. Others, such as views, and those that were named before do nothing.
        """
        entries = {self._names[name] for name in names if name in self._names}
        return self._close(entry for entry in entries if entry in self._leaves)

    def rest(self) -> list[int]:
        """The load is over: everything is final. Leaves that were not before."""
        return self._close(list(self._leaves))

    def _close(self, entries: Iterable[str]) -> list[int]:
        closed = []
        for entry in list(entries):
            for leaf in self._leaves.pop(entry):
                self._waiting[leaf] -= 1
                if not self._waiting[leaf]:
                    closed.append(leaf)
        return sorted(closed)
