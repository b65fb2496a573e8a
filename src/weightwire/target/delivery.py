"""What a schedule knows of one peer: what it has, what it owes, how fast it is. Pure; the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightwire.target.schedule import Flight


@dataclass(slots=True, eq=False)
class Peer:
    """One peer.

    Attributes:
        lanes: how many connections it has.
        have: the leaves that it can serve, as bits.
        share: those for which it is the one to ask.
        joined: when it did.
        total: bytes that it delivered.
        brought: when it delivered anything last, or joined.
        lead: fewest leaves beyond its share that could be claimed of it at a time.
        late: those that were taken from it because it was slow; others are asked for them first.
        flights: what it was asked for and has not delivered, in that order.
        moved: bytes that it delivered, older ones counting less.
        busy: seconds in which it did, likewise.
        since: when it last delivered, or was first asked after it had nothing to do.
    """

    lanes: int
    have: int
    share: int
    since: float
    late: int = 0
    flights: list[Flight] = field(default_factory=list)
    owes: int = 0
    moved: float = 0.0
    busy: float = 0.0
    dropped: bool = False
    joined: float = 0.0
    total: int = 0
    brought: float = 0.0
    lead: int = 1 << 62

    def asked(self, flight: Flight, now: float) -> None:
        """It is to bring ``flight``."""
        if not self.flights:
            self.since = now
        self.flights.append(flight)
        self.owes += flight.span.nbytes

    def forget(self, flight: Flight) -> None:
        """It owes ``flight`` no longer."""
        self.flights.remove(flight)
        self.owes -= flight.span.nbytes

    def delivered(self, flight: Flight, now: float, memory_s: float) -> None:
        """It brought ``flight``; speeds from ``memory_s`` ago count half or so."""
        self.forget(flight)
        elapsed = max(now - self.since, 1e-6)
        keep = memory_s / (memory_s + elapsed)
        self.total += flight.span.nbytes
        self.moved = self.moved * keep + flight.span.nbytes
        self.busy = self.busy * keep + elapsed
        self.since = self.brought = now

    def speed(self, now: float) -> float:
        """Bytes a second; 0 if it never delivered anything.

        Falling while it is silent for longer than what it owes first should take it: before that silence says nothing.
        """
        if not self.moved:
            return 0.0
        if not self.flights:
            return self.moved / self.busy
        due = self.flights[0].span.nbytes * self.busy / self.moved
        return self.moved / (self.busy + max(0.0, now - self.since - due))

    def left(self, ahead: int, now: float) -> float:
        """Seconds until the first ``ahead`` bytes that it owes should be there; one that is silent stays so a while."""
        silent = now - self.since
        if not self.moved:
            return silent
        left = ahead / self.speed(now)
        return max(left, silent) if silent > 2 * ahead * self.busy / self.moved else left
