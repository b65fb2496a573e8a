"""A world with a clock of its own in which peers serve, die, freeze and lie, and a schedule is driven and watched."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from weightwire.manifest.leafset import indices
from weightwire.manifest.records import Leaf
from weightwire.target.schedule import Flight, Lane, Next, Schedule
from weightwire.target.shares import EVERYTHING, Share
from weightwire.types import Span, TensorClass

STALL_S = 10.0
FENCE_S = 0.01
TICK_S = 0.05
NEVER = float("inf")
MIB = 1 << 20


def leaves_of(sizes: Sequence[int]) -> list[Leaf]:
    ends = list(itertools.accumulate(sizes))
    return [Leaf(Span(end - size, size), TensorClass.WEIGHT) for size, end in zip(sizes, ends, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a peer behaves. ``grows``: (time, leaves as bits) that it gets; ``None`` if it has all from the start."""

    speed: float
    lanes: int = 2
    depth: int = 2
    dies: float = NEVER
    freezes: float = NEVER
    bad: frozenset[int] = frozenset()
    grows: tuple[tuple[float, int], ...] | None = None
    share: Share = EVERYTHING

    @property
    def sound(self) -> bool:
        return self.dies == self.freezes == NEVER and not self.bad and self.grows is None


@dataclass(eq=False)
class Line:
    """One connection."""

    lane: Lane
    under_way: deque[Flight] = field(default_factory=deque)
    open: bool = True
    asked: int = 0


class World:
    """Run it once; what must never happen fails an assertion."""

    def __init__(self, schedule: Schedule, leaves: Sequence[Leaf], kinds: Sequence[Kind]) -> None:
        self.schedule = schedule
        self.leaves = leaves
        self.kinds = kinds
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.free = [0.0 for _ in kinds]
        self.dropped: set[int] = set()
        self.fenced: set[int] = set()
        self.writers: dict[int, Flight] = {}
        self.placed: set[int] = set()
        self.brought = [0 for _ in leaves]
        self.repeated: set[int] = set()
        self.bounced: set[Flight] = set()
        self.most_bounced = 0
        self.delivered = [0 for _ in kinds]
        self.lines: dict[Lane, Line] = {}
        for number, kind in enumerate(kinds):
            have = None if kind.grows is None else 0
            assert schedule.join(kind.lanes, 0.0, have, kind.share) == number
            self._begin(number, kind)

    def run(self, until: float) -> None:
        """Until the load is finished, nobody is left, or ``until``."""
        while self.events and not self.schedule.finished and len(self.dropped) < len(self.kinds):
            if self.events[0][0] > until:
                return
            self.now, _, do = heapq.heappop(self.events)
            do()

    @property
    def bytes_brought(self) -> int:
        return sum(count * leaf.span.nbytes for count, leaf in zip(self.brought, self.leaves, strict=True))

    def _begin(self, number: int, kind: Kind) -> None:
        for at in range(kind.lanes):
            line = Line(Lane(number, at))
            self.lines[line.lane] = line
            self._at(0.0, partial(self._tick, line))
        if kind.dies < NEVER:
            self._at(kind.dies, lambda: self._fail(number))
        for when, have in kind.grows or ():
            self._at(when, partial(self.schedule.offers, number, have))

    def _at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), do))

    def _tick(self, line: Line) -> None:
        if line.lane.peer in self.dropped:
            return
        self._at(self.now + TICK_S, lambda: self._tick(line))
        if not line.open:
            line.open = self.schedule.may_claim(line.lane.peer)
        if line.open:
            self._fill(line)
            if not line.under_way:
                self._follow(self.schedule.overdue(line.lane, self.now))

    def _fill(self, line: Line) -> None:
        kind = self.kinds[line.lane.peer]
        while line.open and len(line.under_way) < kind.depth:
            flight = self.schedule.claim(line.lane, self.now)
            if flight is None:
                return
            self._watch(flight)
            line.under_way.append(flight)
            self._serve(line, flight, kind)

    def _watch(self, flight: Flight) -> None:
        """One writer a leaf, the end game only when nothing is left to ask for, and bounce buffers of bounded size."""
        if flight.twin is None:
            assert not self.placed.intersection(flight.leaves)
            assert not self.writers.keys() & set(flight.leaves), "two writers"
            self.writers.update(dict.fromkeys(flight.leaves, flight))
            return
        asked = self.placed | self.writers.keys() | self.repeated
        assert asked == set(range(len(self.leaves))), "asked twice while there was something else to ask for"
        self.repeated.update(flight.leaves)
        self.bounced.add(flight)
        self.most_bounced = max(self.most_bounced, sum(each.span.nbytes for each in self.bounced))

    def _serve(self, line: Line, flight: Flight, kind: Kind) -> None:
        number = line.lane.peer
        done = max(self.now, self.free[number]) + flight.span.nbytes / kind.speed
        self.free[number] = done
        if done < min(kind.freezes, kind.dies):
            self._at(done, lambda: self._done(line, flight))
        slowest = sum(each.span.nbytes for each in line.under_way) / kind.speed
        self._at(self.now + STALL_S + slowest, lambda: self._stalled(line, flight))

    def _stalled(self, line: Line, flight: Flight) -> None:
        if flight in line.under_way and self.now > self.kinds[line.lane.peer].freezes:
            self._fail(line.lane.peer)

    def _done(self, line: Line, flight: Flight) -> None:
        if flight not in line.under_way or not line.open:
            return  # fenced meanwhile
        if self.kinds[line.lane.peer].bad.intersection(flight.leaves):
            self._fail(line.lane.peer)
            return
        line.under_way.remove(flight)
        for leaf in flight.leaves:
            self.brought[leaf] += 1
        if flight.twin is None:
            for leaf in flight.leaves:
                assert self.writers.pop(leaf) is flight
            self._place(flight)
        self._follow(self.schedule.arrived(flight, self.now))
        for other in self.lines.values():
            if other.open and other.lane.peer not in self.dropped:
                self._fill(other)

    def _place(self, flight: Flight) -> None:
        assert not self.placed.intersection(flight.leaves), "verified twice"
        self.placed.update(flight.leaves)
        self.delivered[flight.lane.peer] += flight.span.nbytes

    def _follow(self, todo: Next) -> None:
        for flight in todo.drop:
            self.bounced.remove(flight)
        for flight in todo.copy:
            self.bounced.remove(flight)
            assert not self.writers.keys() & set(flight.leaves), "copied under a writer"
            self._place(flight)
            self.schedule.copied(flight)
        for lane in todo.fence:
            self.fenced.add(lane.peer)
            line = self.lines[lane]
            line.open = False
            self._at(self.now + FENCE_S, partial(self._release, line))
        assert self.placed == set(indices(self.schedule.verified))

    def _fail(self, number: int) -> None:
        self.dropped.add(number)
        self.schedule.drop(number)
        for line in self.lines.values():
            if line.lane.peer == number:
                line.open = False
                self._release(line)

    def _release(self, line: Line) -> None:
        for flight in line.under_way:
            if flight.twin is not None:
                self.bounced.remove(flight)
            for leaf in flight.leaves:
                if self.writers.get(leaf) is flight:
                    del self.writers[leaf]
        line.under_way.clear()
        self._follow(self.schedule.released(line.lane))
