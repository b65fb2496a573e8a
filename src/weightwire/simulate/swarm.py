"""Newcomers that fill themselves from sources and from each other, as real ones do, but for the bytes.

Where each reads is decided by ``metadata.selection`` and what it asks for by ``target.schedule``: the very code of real
loads, under the clock of a :class:`~weightwire.simulate.world.World`.
"""

from __future__ import annotations

import bisect
import heapq
import random
from dataclasses import dataclass, field

from weightwire.manifest.records import Leaf
from weightwire.metadata.selection import CHAIN, Seat, seated
from weightwire.simulate.network import Host, Rack, Stage, deliver
from weightwire.simulate.world import World
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
        return self.rate * (self.replicas + self.sources) / self.racks / self.oversubscription


@dataclass(slots=True, eq=False)
class Link:
    """One peer of a newcomer.

    Attributes:
        reads: under way there.
        connection: how many were fenced before this one.
        gone: it is asked for nothing any more.
    """

    peer: Replica
    seat: Seat
    lane: Lane
    reads: int = 0
    connection: int = 0
    gone: bool = False


@dataclass(slots=True, eq=False)
class Replica:
    """One replica; ``schedule`` is None for one that was complete from the start."""

    number: int
    host: Host
    joined: float
    schedule: Schedule | None = None
    slow: bool = False
    alive: bool = True
    ready: float | None = None
    links: list[Link] = field(default_factory=list)
    readers: list[tuple[Replica, Link]] = field(default_factory=list)


class Swarm:
    """One simulation; ``run`` it once.

    Attributes:
        replicas: all that there ever were, the sources first.
        sources: the first of them.
        world: its clock and count of events.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = World()
        self._random = random.Random(plan.seed)  # noqa: S311  (no secret)
        count = -(-plan.nbytes // plan.chunk)
        spans = (Span(at * plan.chunk, min(plan.chunk, plan.nbytes - at * plan.chunk)) for at in range(count))
        self._leaves = [Leaf(span, TensorClass.WEIGHT) for span in spans]
        self._racks = [Rack(Stage(plan.rack_rate), Stage(plan.rack_rate)) for _ in range(plan.racks)]
        capped = min(plan.cap, plan.rate) if plan.cap else plan.rate
        self.replicas = [Replica(at, self._host(at, capped, plan.rate), 0.0, ready=0.0) for at in range(plan.sources)]
        self.sources = tuple(self.replicas)
        self._complete = list(self.sources)
        self._relays: list[Replica] = []
        self._left = plan.replicas
        self._depth = 2 + int(plan.latency_s * plan.rate / plan.chunk)  # reads under way at each peer: enough
        self._tick_s = max(0.02, plan.nbytes / plan.rate / 50)

    def run(self) -> None:
        """Until every newcomer that lives is READY, and those that are to come again are, too.

        Bounded: nothing may take a thousand times as long as one copy.
        """
        plan, one = self.plan, self.plan.nbytes / self.plan.rate
        slow = set(self._random.sample(range(plan.replicas), round(plan.slow * plan.replicas)))
        dying = set(self._random.sample(range(plan.replicas), round(plan.deaths * plan.replicas)))
        for at in range(plan.replicas):
            joined = self._random.uniform(0, plan.spread_s)
            dies = joined + self._random.uniform(0, one) if at in dying else None
            self.world.at(joined, self._join, at in slow, dies)
        self.world.run(1000 * one)

    # ---- replicas come and go

    def _host(self, number: int, up: float, down: float) -> Host:
        return Host(Stage(up), Stage(down), self._racks[number % len(self._racks)] if self._racks else None)

    def _join(self, slow: bool, dies: float | None) -> None:
        plan, number = self.plan, len(self.replicas)
        rate = plan.rate / (plan.slow_factor if slow else 1.0)
        schedule = Schedule(self._leaves, range(len(self._leaves)), plan.chunk)
        made = Replica(number, self._host(number, rate, rate), self.world.now, schedule, slow)
        self.replicas.append(made)
        self._relays.append(made)
        self.world.at(self.world.now, self._find, made)  # those of the same moment are all there by then
        self.world.at(self.world.now + self._tick_s, self._tick, made)
        self.world.at(self.world.now + ASK_S, self._close_up, made, 2 * ASK_S)
        if dies is not None:
            self.world.at(dies, self._die, made)

    def _die(self, dead: Replica) -> None:
        dead.alive = False
        (self._relays if dead.ready is None else self._complete).remove(dead)
        for reader, link in dead.readers:
            self.world.at(self.world.now + self.plan.heal_s, self._lost, reader, link)
        for link in dead.links:
            if not link.gone:
                self._retire(dead, link)
        if self.plan.rejoin_s:
            self._left += dead.ready is not None
            self.world.at(self.world.now + self.plan.rejoin_s, self._join, dead.slow, None)
        elif dead.ready is None:
            self._done()

    def _lost(self, reader: Replica, link: Link) -> None:
        assert reader.schedule is not None
        if not link.gone and reader.alive and reader.ready is None:
            self._retire(reader, link)
            self._fence(reader, link)
            self._find(reader)

    def _done(self) -> None:
        self._left -= 1
        if not self._left:
            self.world.stop()

    # ---- who reads from whom

    def _find(self, asker: Replica) -> None:
        """As a target asks the metadata server when it starts, or has lost a peer."""
        if asker.ready is None and asker.alive:
            self._take(asker, self._seated(asker))

    def _close_up(self, asker: Replica, pause: float) -> None:
        """It asks again from time to time: in the chain, another may have its place next to it by now."""
        if asker.alive and asker.ready is None:
            self.world.at(self.world.now + pause, self._close_up, asker, 2 * pause)
            seats = self._seated(asker)
            chained = any(link.seat.parts == 1 and link.peer.ready is None for link in asker.links if not link.gone)
            if chained and seats and seats[0][1].parts == 1:
                self._take(asker, seats)

    def _take(self, asker: Replica, seats: list[tuple[Replica, Seat]]) -> None:
        """Open what is new, and ask nothing more of what was replaced. In trees, whoever delivers is kept."""
        open_ = [link for link in asker.links if not link.gone]
        kept: list[Link] = []
        for peer, seat in seats:
            same = [link for link in open_ if (link.seat.part, link.seat.parts) == (seat.part, seat.parts)]
            if seat.parts < 2 and peer.ready is None:
                same = [link for link in same if link.peer is peer]
            kept += same
            if not same:
                self._open(asker, peer, seat)
        for link in open_:
            if link not in kept:
                self._retire(asker, link)

    def _seated(self, asker: Replica) -> list[tuple[Replica, Seat]]:
        idle = heapq.nsmallest(4, self._complete, key=lambda each: (len(each.readers), each.number))
        if self.plan.star:
            return [(each, Seat(None)) for each in idle]
        before = bisect.bisect_left(self._relays, asker.number, key=lambda each: each.number)
        others = self._relays[:before] + self._relays[before + 1 :]
        begun = asker.schedule is not None and asker.schedule.verified > 0
        return seated(others, before, idle, lambda each: len(each.readers), begun=begun, chain=self.plan.chain)

    def _open(self, asker: Replica, peer: Replica, seat: Seat) -> None:
        assert asker.schedule is not None
        have = None if peer.schedule is None else peer.schedule.verified
        number = asker.schedule.join(1, self.world.now, have, Share(seat.part, seat.parts))
        link = Link(peer, seat, Lane(number, 0))
        asker.links.append(link)
        peer.readers.append((asker, link))
        self._fill(asker, link)

    def _retire(self, asker: Replica, link: Link) -> None:
        assert asker.schedule is not None
        asker.schedule.drop(link.lane.peer)
        link.gone = True
        if link.peer.alive:
            link.peer.readers.remove((asker, link))

    # ---- bytes

    def _fill(self, reader: Replica, link: Link) -> None:
        schedule, world, up = reader.schedule, self.world, link.peer.host.up
        assert schedule is not None
        while link.reads < self._depth and not link.gone:
            flight = schedule.claim(link.lane, world.now)
            if flight is None:
                return
            link.reads += 1
            turn = max(world.now + self.plan.latency_s, up.free)
            up.free = turn + flight.span.nbytes / up.rate
            world.at(turn, self._send, reader, link, flight, link.connection)

    def _send(self, reader: Replica, link: Link, flight: Flight, connection: int) -> None:
        sender = link.peer
        if link.connection != connection or not reader.alive:
            return
        if not sender.alive and link.gone:  # nobody told it: it had turned to another already
            self._fence(reader, link)
        elif sender.alive:
            sender.host.up.served += flight.span.nbytes
            there = deliver(sender.host, reader.host, self.world.now, flight.span.nbytes)
            self.world.at(there, self._arrive, reader, link, flight, connection)

    def _arrive(self, reader: Replica, link: Link, flight: Flight, connection: int) -> None:
        schedule = reader.schedule
        if schedule is None or reader.ready is not None or not reader.alive or link.connection != connection:
            return
        link.reads -= 1
        self._follow(reader, schedule.arrived(flight, self.world.now))
        self._show(reader, schedule.verified)
        if schedule.finished:
            self._ready(reader)
        else:
            self._fill(reader, link)

    def _show(self, relay: Replica, leaves: int) -> None:
        for other, link in relay.readers:
            if other.ready is None and other.schedule is not None:
                other.schedule.offers(link.lane.peer, leaves)
                self._fill(other, link)

    def _ready(self, done: Replica) -> None:
        done.ready = self.world.now
        self._relays.remove(done)
        self._complete.append(done)
        for link in done.links:
            if not link.gone:
                self._retire(done, link)
        self._done()

    def _follow(self, reader: Replica, todo: Next) -> None:
        assert reader.schedule is not None
        for flight in todo.copy:
            reader.schedule.copied(flight)
        for lane in todo.fence:
            self._fence(reader, reader.links[lane.peer])

    def _fence(self, reader: Replica, link: Link) -> None:
        assert reader.schedule is not None
        link.connection += 1
        link.reads = 0
        self._follow(reader, reader.schedule.released(link.lane))

    def _tick(self, reader: Replica) -> None:
        """What a lane with nothing to do does from time to time."""
        schedule = reader.schedule
        if schedule is None or not reader.alive or reader.ready is not None:
            return
        for link in reader.links:
            self._fill(reader, link)
            if not link.reads and not link.gone:
                self._follow(reader, schedule.overdue(link.lane, self.world.now))
        if schedule.finished:
            self._ready(reader)
        else:
            self.world.at(self.world.now + self._tick_s, self._tick, reader)
