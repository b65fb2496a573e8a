"""Newcomers that fill themselves from sources and from each other, as real ones do, but for the bytes.

Where each reads is decided by ``metadata.selection`` and what it asks for by ``target.schedule``: the very code of real
loads, under a virtual clock.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from weightwire.manifest.records import Leaf
from weightwire.metadata.selection import CHAIN, ROOT_SOURCES, Seat, seated
from weightwire.simulate.network import Stage, deliver
from weightwire.target.schedule import Flight, Lane, Next, Schedule
from weightwire.target.shares import Share
from weightwire.types import Span, TensorClass

ASK_S = 1.0
"""After so long a newcomer asks again, after twice as long once more, and so on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is simulated; seconds, bytes, and bytes a second.

    Attributes:
        replicas: newcomers.
        nbytes: of the shard.
        rate: of each link, in each direction.
        sources: complete replicas at the beginning.
        chunk: bytes asked for at a time; one leaf each.
        cap: what one source gives away at most; 0 for no bound.
        racks: how many; 0 for a network without bottlenecks between hosts. Hosts are dealt out to them in turn.
        oversubscription: what a rack's hosts could send together, over its link to the others.
        slow: share of the newcomers that have slow links.
        slow_factor: how many times slower.
        deaths: share of the newcomers that die, once, while they could be loading.
        rejoin_s: so long after, another replica starts in its place; 0 for never.
        spread_s: newcomers arrive in this time; 0 for all at once.
        latency_s: from a leaf's arrival until another may have asked for it.
        heal_s: from a death until those who read there have found another.
        chain: most relays that form a chain; see ``metadata.selection``.
        star: everybody reads from the sources alone, for comparison.
        seed: of deaths, slow ones and arrivals.
    """

    replicas: int
    nbytes: int = 90_000_000_000
    rate: float = 50e9
    sources: int = 1
    chunk: int = 0
    cap: float = 0.0
    racks: int = 0
    oversubscription: float = 1.0
    slow: float = 0.0
    slow_factor: float = 4.0
    deaths: float = 0.0
    rejoin_s: float = 0.0
    spread_s: float = 0.0
    latency_s: float = 0.0005
    heal_s: float = 0.05
    chain: int = CHAIN
    star: bool = False
    seed: int = 0

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
    """One peer of a newcomer.

    Attributes:
        path: from the peer's uplink to the reader's downlink.
        reads: under way there, and not fenced.
        gone: it is asked for nothing any more.
    """

    reader: Replica
    peer: Replica
    share: Share
    lane: Lane
    path: tuple[Stage, ...]
    reads: set[Flight] = field(default_factory=set)
    gone: bool = False


@dataclass(slots=True, eq=False)
class Replica:
    """One replica; nothing is missing in the ``schedule`` of one that was complete from the start.

    Attributes:
        rack: what leaves it and what enters it.
        links: to all that it ever read from, by their numbers in the schedule.
        readers: the links of those that read from it now.
        sent: bytes.
    """

    number: int
    up: Stage
    down: Stage
    rack: tuple[Stage, Stage]
    schedule: Schedule
    joined: float = 0.0
    slow: bool = False
    alive: bool = True
    ready: float | None = None
    links: list[Link] = field(default_factory=list)
    readers: list[Link] = field(default_factory=list)
    sent: int = 0


class Swarm:
    """One simulation; ``run`` it once.

    Attributes:
        now: seconds since the beginning.
        events: how many have happened.
        replicas: all that there ever were, the sources first.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.now, self.events = 0.0, 0
        self._later: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        spans = (Span(at, min(plan.chunk, plan.nbytes - at)) for at in range(0, plan.nbytes, plan.chunk))
        self._leaves = [Leaf(span, TensorClass.WEIGHT) for span in spans]
        self._racks = [(Stage(plan.rack_rate), Stage(plan.rack_rate)) for _ in range(max(1, plan.racks))]
        self.replicas: list[Replica] = []
        self._complete = [self._replica(min(plan.cap or plan.rate, plan.rate), plan.rate) for _ in range(plan.sources)]
        self._relays: list[Replica] = []
        self._coming = plan.replicas
        self._depth = 2 + int(plan.latency_s * plan.rate / plan.chunk)  # reads under way at each peer: enough
        self._tick_s = max(0.02, plan.nbytes / plan.rate / 50)

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        """Call ``do(*args)`` at ``when``, which is not before now; at one time, in order of entry."""
        heapq.heappush(self._later, (when, next(self._order), do, args))

    def run(self) -> None:
        """Until every newcomer that lives is READY, and those that are to come again are, too.

        Bounded: nothing may take a thousand times as long as one copy.
        """
        plan, one = self.plan, self.plan.nbytes / self.plan.rate
        chance = random.Random(plan.seed)  # noqa: S311  (no secret)
        slow = set(chance.sample(range(plan.replicas), round(plan.slow * plan.replicas)))
        dying = set(chance.sample(range(plan.replicas), round(plan.deaths * plan.replicas)))
        for at in range(plan.replicas):
            joins = chance.uniform(0, plan.spread_s)
            self.at(joins, self._join, at in slow, chance.uniform(0, one) if at in dying else math.inf)
        while (self._coming or self._relays) and self._later[0][0] <= 1000 * one:
            self.now, _, do, args = heapq.heappop(self._later)
            self.events += 1
            do(*args)

    # ---- replicas come and go

    def _replica(self, up: float, down: float, missing: int = 0) -> Replica:
        number, schedule = len(self.replicas), Schedule(self._leaves, range(missing), self.plan.chunk)
        rack = self._racks[number % len(self._racks)]
        made = Replica(number, Stage(up), Stage(down), rack, schedule, self.now, ready=None if missing else 0.0)
        self.replicas.append(made)
        return made

    def _join(self, slow: bool, life_s: float) -> None:
        rate = self.plan.rate / (self.plan.slow_factor if slow else 1.0)
        made = self._replica(rate, rate, len(self._leaves))
        made.slow = slow
        self._coming -= 1
        self._relays.append(made)
        self.at(self.now, self._find, made)  # those of the same moment are all there by then
        self.at(self.now + self._tick_s, self._tick, made)
        self.at(self.now + ASK_S, self._close_up, made, 2 * ASK_S)
        self.at(self.now + life_s, self._die, made)

    def _die(self, dead: Replica) -> None:
        dead.alive = False
        (self._relays if dead.ready is None else self._complete).remove(dead)
        for link in dead.readers:
            self.at(self.now + self.plan.heal_s, self._lost, link)
        for link in dead.links:
            self._retire(link)
        if self.plan.rejoin_s:
            self._coming += 1
            self.at(self.now + self.plan.rejoin_s, self._join, dead.slow, math.inf)

    def _lost(self, link: Link) -> None:
        if not link.gone:
            self._retire(link)
            self._follow(link.reader, Next(fence=(link.lane,)))
            self._find(link.reader)

    # ---- who reads from whom

    def _seated(self, asker: Replica) -> list[tuple[Replica, Seat]]:
        idle = heapq.nsmallest(ROOT_SOURCES, self._complete, key=lambda each: (len(each.readers), each.number))
        if self.plan.star:
            return [(each, Seat(None)) for each in idle]
        before = self._relays.index(asker)
        others = self._relays[:before] + self._relays[before + 1 :]
        begun = asker.schedule.verified > 0
        return seated(others, before, idle, lambda each: len(each.readers), begun=begun, chain=self.plan.chain)

    def _close_up(self, asker: Replica, pause: float) -> None:
        """It asks again from time to time: in the chain, another may have its place next to it by now."""
        if asker.alive and asker.ready is None:
            self.at(self.now + pause, self._close_up, asker, 2 * pause)
            chained = any(link.share.parts == 1 and link.peer.ready is None for link in asker.links if not link.gone)
            if chained and any(seat.parts == 1 for _, seat in self._seated(asker)):
                self._find(asker)

    def _find(self, asker: Replica) -> None:
        """As a target asks the metadata server when it starts, or has lost a peer.

        What is new is opened, and nothing more is asked of what was replaced. In trees, whoever delivers is kept.
        """
        if asker.ready is not None:
            return
        links, kept = [link for link in asker.links if not link.gone], list[Link]()
        for peer, seat in self._seated(asker):
            share, anyone = Share(seat.part, seat.parts), seat.parts > 1 or peer.ready is not None
            same = [link for link in links if link.share == share and (anyone or link.peer is peer)]
            kept += same
            if not same:
                self._open(asker, peer, share)
        for link in links:
            if link not in kept:
                self._retire(link)

    def _open(self, reader: Replica, peer: Replica, share: Share) -> None:
        have = peer.schedule.verified if peer.ready is None else None
        lane = Lane(reader.schedule.join(1, self.now, have, share), 0)
        between = (peer.rack[0], reader.rack[1]) if peer.rack is not reader.rack else ()
        link = Link(reader, peer, share, lane, (peer.up, *between, reader.down))
        reader.links.append(link)
        peer.readers.append(link)
        self._fill(link)

    def _retire(self, link: Link) -> None:
        if not link.gone:
            link.gone = True
            link.reader.schedule.drop(link.lane.peer)
            link.peer.readers.remove(link)

    # ---- bytes

    def _fill(self, link: Link) -> None:
        """Ask for as much as may be under way; nothing of a peer that is gone."""
        asked = self.now + self.plan.latency_s
        while len(link.reads) < self._depth:
            flight = link.reader.schedule.claim(link.lane, self.now)
            if flight is None:
                return
            link.reads.add(flight)
            turn, _ = link.path[0].pass_on(asked, asked, flight.span.nbytes)
            self.at(turn, self._send, link, flight)

    def _send(self, link: Link, flight: Flight) -> None:
        if flight not in link.reads or not link.reader.alive:
            return
        if link.peer.alive:
            link.peer.sent += flight.span.nbytes
            self.at(deliver(link.path, self.now, flight.span.nbytes), self._arrive, link, flight)
        elif link.gone:  # nobody told it: it had turned to another already
            self._follow(link.reader, Next(fence=(link.lane,)))

    def _arrive(self, link: Link, flight: Flight) -> None:
        reader = link.reader
        if flight not in link.reads or not reader.alive or reader.ready is not None:
            return
        link.reads.remove(flight)
        self._follow(reader, reader.schedule.arrived(flight, self.now))
        for onward in reader.readers:
            onward.reader.schedule.offers(onward.lane.peer, reader.schedule.verified)
            self._fill(onward)
        self._fill(link)

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

    def _tick(self, reader: Replica) -> None:
        """What a lane with nothing to do does from time to time."""
        if reader.alive and reader.ready is None:
            self.at(self.now + self._tick_s, self._tick, reader)
            for link in reader.links:
                self._fill(link)
                if not link.reads:
                    self._follow(reader, reader.schedule.overdue(link.lane, self.now))
