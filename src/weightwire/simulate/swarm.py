"""Newcomers that fill themselves from sources and from each other, as real ones do, but for the bytes.

Where each reads is decided by ``metadata.selection`` and what it asks for by ``target.schedule``: the very code of real
loads, under a virtual clock.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from weightwire.manifest.records import Leaf
from weightwire.metadata.selection import CHAIN, ROOT_SOURCES, seated
from weightwire.simulate.network import Stage, deliver
from weightwire.target.schedule import Flight, Lane, Next, Schedule
from weightwire.target.shares import Share
from weightwire.types import Span, TensorClass

ASK_S = 1.0
"""After so long a newcomer asks again, after twice as long once more, and so on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is simulated; seconds, bytes, and bytes a second."""

    replicas: int  # newcomers
    nbytes: int = 90_000_000_000  # of the shard
    rate: float = 50e9  # of each link, in each direction
    sources: int = 1  # complete replicas at the beginning
    chunk: int = 0  # bytes asked for at a time, one leaf each; 0 for that of a real load, or larger
    cap: float = 0.0  # what one source gives away at most; 0 for no bound
    racks: int = 0  # hosts are dealt out to so many in turn; 0 for a network without bottlenecks between hosts
    oversubscription: float = 1.0  # what a rack's hosts could send together, over its link to the others
    slow: float = 0.0  # share of the newcomers that have slow links
    slow_factor: float = 4.0  # how many times slower
    deaths: float = 0.0  # share of the newcomers that die, once, while they could be loading
    rejoin_s: float = 0.0  # so long after, another replica starts in its place; 0 for never
    spread_s: float = 0.0  # newcomers arrive in this time; 0 for all at once
    latency_s: float = 0.0005  # from a leaf's arrival until another may have asked for it
    heal_s: float = 0.05  # from a death until those who read there have found another
    chain: int = CHAIN  # most relays that form a chain; see ``metadata.selection``
    star: bool = False  # everybody reads from the sources alone, for comparison
    seed: int = 0  # of deaths, slow ones and arrivals

    @property
    def rack_rate(self) -> float:
        """Of a rack's link to the others, in each direction."""
        return self.rate * (self.replicas + self.sources) / max(1, self.racks) / self.oversubscription

    @property
    def bound_s(self) -> float:
        """One copy must pass a newcomer's link, leave the sources, and enter each rack over its link."""
        rack = self.rack_rate if self.racks > 1 else math.inf
        return self.nbytes / min(self.rate, self.sources * (self.cap or self.rate), rack)


@dataclass(slots=True, eq=False)
class Link:
    """One peer of a newcomer."""

    reader: Replica
    peer: Replica
    share: Share
    lane: Lane
    path: tuple[Stage, ...]  # from the peer's uplink to the reader's downlink
    reads: set[Flight] = field(default_factory=set)  # under way there, and not fenced
    gone: bool = False  # it is asked for nothing any more


@dataclass(slots=True, eq=False)
class Replica:
    """One replica."""

    number: int
    up: Stage
    down: Stage
    rack: tuple[Stage, Stage]  # what leaves it and what enters it
    schedule: Schedule  # in which nothing is missing if it was complete from the start
    joined: float
    ready: float | None = None
    alive: bool = True
    links: list[Link] = field(default_factory=list)  # to all that it ever read from, by their numbers in the schedule
    readers: list[Link] = field(default_factory=list)  # of those that read from it now
    sent: int = 0  # bytes


class Swarm:
    """One simulation: ``run`` it once. ``replicas`` are all that there ever were, the sources first.

    Whatever takes time is a process: an iterator that yields when it is to go on.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.now, self.events = 0.0, 0
        self._later: list[tuple[float, int, Iterator[float]]] = []
        self._order = itertools.count()
        spans = (Span(at, min(plan.chunk, plan.nbytes - at)) for at in range(0, plan.nbytes, plan.chunk))
        self._leaves = [Leaf(span, TensorClass.WEIGHT) for span in spans]
        self._racks = [(Stage(plan.rack_rate), Stage(plan.rack_rate)) for _ in range(max(1, plan.racks))]
        self.replicas: list[Replica] = []
        self._complete = [self._replica(min(plan.cap or plan.rate, plan.rate), plan.rate) for _ in range(plan.sources)]
        self._relays: list[Replica] = []
        self._coming = plan.replicas
        self._depth = 2 + int(plan.latency_s * plan.rate / plan.chunk)  # reads under way at each peer: enough

    def enter(self, when: float, process: Iterator[float]) -> None:
        """Let ``process`` go on at ``when``, which is not before now; at one time, in order of entry."""
        heapq.heappush(self._later, (when, next(self._order), process))

    def run(self) -> None:
        """Until all that live are READY, also those that come again; at most a thousand times as long as one copy."""
        plan, one = self.plan, self.plan.nbytes / self.plan.rate
        chance = random.Random(plan.seed)  # noqa: S311  (no secret)
        slow = set(chance.sample(range(plan.replicas), round(plan.slow * plan.replicas)))
        dying = set(chance.sample(range(plan.replicas), round(plan.deaths * plan.replicas)))
        for at in range(plan.replicas):
            joins = chance.uniform(0, plan.spread_s)
            rate = plan.rate / (plan.slow_factor if at in slow else 1.0)
            self.enter(joins, self._newcomer(rate, chance.uniform(0, one) if at in dying else math.inf))
        while (self._coming or self._relays) and self._later[0][0] <= 1000 * one:
            self.now, _, process = heapq.heappop(self._later)
            self.events += 1
            if (when := next(process, None)) is not None:
                self.enter(when, process)

    # ---- replicas come and go

    def _replica(self, up: float, down: float, missing: int = 0) -> Replica:
        number, schedule = len(self.replicas), Schedule(self._leaves, range(missing), self.plan.chunk)
        rack, ready = self._racks[number % len(self._racks)], None if missing else 0.0
        self.replicas.append(Replica(number, Stage(up), Stage(down), rack, schedule, self.now, ready))
        return self.replicas[-1]

    def _newcomer(self, rate: float, life_s: float) -> Iterator[float]:
        made = self._replica(rate, rate, len(self._leaves))
        self._coming -= 1
        self._relays.append(made)
        yield self.now  # those of the same moment are all there by then
        self._find(made)
        self.enter(self.now + life_s, self._death(made))
        self.enter(self.now + ASK_S, self._close_up(made))
        while made.alive and made.ready is None:  # from time to time, what a lane with nothing to do does
            yield self.now + max(0.02, self.plan.nbytes / self.plan.rate / 50)
            for link in made.links:
                self._fill(link)
                if not link.reads:
                    self._follow(made, made.schedule.overdue(link.lane, self.now))

    def _death(self, dead: Replica) -> Iterator[float]:
        dead.alive = False
        (self._relays if dead.ready is None else self._complete).remove(dead)
        for link in dead.links:
            self._retire(link)
        if self.plan.rejoin_s:
            self._coming += 1
            self.enter(self.now + self.plan.rejoin_s, self._newcomer(dead.down.rate, math.inf))
        yield self.now + self.plan.heal_s
        while dead.readers:
            lost = dead.readers[0]
            self._retire(lost)
            self._follow(lost.reader, Next(fence=(lost.lane,)))
            if lost.reader.ready is None:
                self._find(lost.reader)

    # ---- who reads from whom

    def _close_up(self, asker: Replica) -> Iterator[float]:
        """It asks again from time to time: in the chain, another may have its place next to it by now."""
        pause = ASK_S
        while asker.alive and asker.ready is None:
            if any(link.share.parts == 1 and link.peer.ready is None for link in asker.links if not link.gone):
                self._find(asker, chained=True)
            pause *= 2
            yield self.now + pause

    def _find(self, asker: Replica, *, chained: bool = False) -> None:
        """As a target asks the metadata server when it starts, or has lost a peer; ``chained``: not to enter a tree.

        What is new is opened, and nothing more is asked of what was replaced. In trees, whoever delivers is kept.
        """
        before = 0 if self.plan.star else self._relays.index(asker)
        others = [] if self.plan.star else self._relays[:before] + self._relays[before + 1 :]
        idle = heapq.nsmallest(ROOT_SOURCES, self._complete, key=lambda each: (len(each.readers), each.number))
        begun = asker.schedule.verified > 0
        seats = seated(others, before, idle, lambda each: len(each.readers), begun=begun, chain=self.plan.chain)
        if chained and not any(seat.parts == 1 for _, seat in seats):
            return
        links, kept = [link for link in asker.links if not link.gone], list[Link]()
        for peer, seat in seats:
            share, anyone = Share(seat.part, seat.parts), seat.parts > 1 or peer.ready is not None
            same = [link for link in links if link.share == share and (anyone or link.peer is peer)]
            kept += same
            if not same:
                have = peer.schedule.verified if peer.ready is None else None
                lane = Lane(asker.schedule.join(1, self.now, have, share), 0)
                between = (peer.rack[0], asker.rack[1]) if peer.rack is not asker.rack else ()
                asker.links.append(Link(asker, peer, share, lane, (peer.up, *between, asker.down)))
                peer.readers.append(asker.links[-1])
                self._fill(asker.links[-1])
        for link in links:
            if link not in kept:
                self._retire(link)

    def _retire(self, link: Link) -> None:
        if not link.gone:
            link.gone = True
            link.reader.schedule.drop(link.lane.peer)
            link.peer.readers.remove(link)

    # ---- bytes

    def _fill(self, link: Link) -> None:
        """Ask for as much as may be under way; nothing of a peer that is gone."""
        asked, claim = self.now + self.plan.latency_s, link.reader.schedule.claim
        while len(link.reads) < self._depth and (flight := claim(link.lane, self.now)) is not None:
            link.reads.add(flight)
            turn, _ = link.path[0].pass_on(asked, asked, flight.span.nbytes)
            self.enter(turn, self._read(link, flight))

    def _read(self, link: Link, flight: Flight) -> Iterator[float]:
        """From its turn at the uplink on."""
        reader, sender = link.reader, link.peer
        if sender.alive and reader.alive and flight in link.reads:
            sender.sent += flight.span.nbytes
            yield deliver(link.path, self.now, flight.span.nbytes)
            if reader.alive and reader.ready is None and flight in link.reads:
                link.reads.remove(flight)
                self._follow(reader, reader.schedule.arrived(flight, self.now))
                for onward in reader.readers:
                    onward.reader.schedule.offers(onward.lane.peer, reader.schedule.verified)
                    self._fill(onward)
                self._fill(link)
        elif link.gone and reader.alive and flight in link.reads:  # nobody told it: it had turned to another already
            self._follow(reader, Next(fence=(link.lane,)))

    def _follow(self, reader: Replica, todo: Next) -> None:
        """Do what the schedule asks for; a newcomer that has everything then is READY."""
        for flight in todo.copy:
            reader.schedule.copied(flight)
        for lane in todo.fence:
            reader.links[lane.peer].reads.clear()
            self._follow(reader, reader.schedule.released(lane))
        if reader.schedule.finished and reader.ready is None:
            reader.ready = self.now
            self._relays.remove(reader)
            self._complete.append(reader)
            for link in reader.links:
                self._retire(link)
