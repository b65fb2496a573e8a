"""How long bytes take: network interfaces that serve one chunk after the other, and racks above them.

A chunk waits for its sender's uplink, then passes whatever is between and the receiver's downlink while it is being
sent (no stage waits for a whole chunk unless it is busy with another). Every stage serves in the order of arrival, at
its full rate; there is room for what waits between two stages. So a link that several chunks share is always busy, and
none of them is faster than its narrowest stage. There is no loss, and no cost of a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Stage:
    """One direction of a link: ``rate`` bytes a second, ``free`` when it has served all that it was given."""

    rate: float
    free: float = 0.0

    def pass_on(self, begin: float, end: float, nbytes: int) -> tuple[float, float]:
        """What arrives here from ``begin`` to ``end``: from when to when it leaves."""
        begin = max(begin, self.free)
        self.free = max(end, begin + nbytes / self.rate)
        return begin, self.free


def deliver(path: Sequence[Stage], now: float, nbytes: int) -> float:
    """When ``nbytes`` are at the end of ``path`` whose turn at its first stage, the sender's uplink, is now."""
    begin, end = now, now + nbytes / path[0].rate
    for stage in path[1:]:
        begin, end = stage.pass_on(begin, end, nbytes)
    return end
