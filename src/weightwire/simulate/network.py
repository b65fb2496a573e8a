"""How long bytes take: network interfaces that serve one chunk after the other, and racks above them.

A chunk waits for its sender's uplink, then passes whatever is between and the receiver's downlink while it is being
sent (no stage waits for a whole chunk unless it is busy with another). Every stage serves in the order of arrival, at
its full rate; there is room for what waits between two stages. So a link that several chunks share is always busy, and
none of them is faster than its narrowest stage. There is no loss, and no cost of a connection.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Stage:
    """One direction of a link.

    Attributes:
        rate: bytes a second.
        free: when it has served all that it was given.
        served: bytes.
    """

    rate: float
    free: float = 0.0
    served: int = 0

    def pass_on(self, begin: float, end: float, nbytes: int) -> tuple[float, float]:
        """What arrives here from ``begin`` to ``end``: from when to when it leaves."""
        begin = max(begin, self.free)
        self.free = max(end, begin + nbytes / self.rate)
        self.served += nbytes
        return begin, self.free


@dataclass(slots=True, eq=False)
class Rack:
    """What its hosts share towards other racks."""

    up: Stage
    down: Stage


@dataclass(slots=True, eq=False)
class Host:
    """One replica's place in the network."""

    up: Stage
    down: Stage
    rack: Rack | None = None


def deliver(sender: Host, receiver: Host, now: float, nbytes: int) -> float:
    """When ``nbytes`` arrive whose turn at the sender's uplink is now."""
    begin, end = now, now + nbytes / sender.up.rate
    if sender.rack is not receiver.rack and sender.rack is not None and receiver.rack is not None:
        begin, end = sender.rack.up.pass_on(begin, end, nbytes)
        begin, end = receiver.rack.down.pass_on(begin, end, nbytes)
    return receiver.down.pass_on(begin, end, nbytes)[1]
