"""Which leaves are missing, who fetches which of them now, and which are verified: a pure core.

No I/O, no threads, and no clock of its own: calls that need the time are told it, on any monotonic clock in seconds.
``target.work`` drives it with threads, a simulation with a virtual clock.

The rules that it keeps:

- A leaf's memory has at most one writer. What a *lane* (one connection to one peer) was asked to write is free for
  another only once that lane was ``released``: its connection is finished or fenced.
- Nothing is fetched twice but in the *end game*: when no leaf is left to ask for, chunks that a slow peer still owes
  are asked again of a faster one, into bounce buffers of bounded size. What arrived there is copied into place only
  after its first writer was released.
- What a peer is asked for at a time follows its measured speed, so that a slow one holds little.
- A peer may have a *share* of the leaves, and is asked for others only where they lag (see ``target.shares``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from weightwire.manifest.leafset import lowest, mask_of, runs
from weightwire.manifest.records import Leaf
from weightwire.target.delivery import Peer
from weightwire.target.shares import EVERYTHING, Share, Shares
from weightwire.types import Span


@dataclass(frozen=True, slots=True)
class Lane:
    """One connection to one peer."""

    peer: int
    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A run of neighbouring leaves that one read fetches.

    Attributes:
        lane: who fetches it.
        first: index of its first leaf in the layout.
        count: how many leaves.
        span: their bytes.
        twin: the flight that this one repeats; then it goes into a bounce buffer, never into place.
    """

    lane: Lane
    first: int
    count: int
    span: Span
    twin: Flight | None = None

    @property
    def leaves(self) -> range:
        """Indices of its leaves."""
        return range(self.first, self.first + self.count)

    @property
    def mask(self) -> int:
        """Its leaves as a set of bits."""
        return mask_of(self.leaves)


@dataclass(frozen=True, slots=True)
class Next:
    """What the driver has to do now.

    Attributes:
        copy: flights whose bounce buffers are to be copied into place, then ``copied``.
        drop: flights whose bounce buffers are of no more use.
        fence: lanes that are to be fenced, and then ``released``: what they owe has arrived from elsewhere, or will.
    """

    copy: tuple[Flight, ...] = ()
    drop: tuple[Flight, ...] = ()
    fence: tuple[Lane, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a schedule behaves; seconds and bytes.

    Attributes:
        in_flight_s: what is asked of a peer at a time should take it so long.
        memory_s: how far back its speed is measured.
        most_window: bytes in flight at one peer, whatever its speed.
        read_s: what one read asks for should take so long, or is a chunk: others wait for it in a chain of relays.
        bounce: bytes of all bounce buffers together; 0 where there can be none.
        gain: a chunk is asked again where it would arrive so many times sooner.
        gain_s: and so much sooner at least.
        lost: one too large for a bounce buffer is taken from its peer first, where it would arrive that much sooner.
        lost_s: and so much sooner at least; twice as much after each time, so that it does not go on for ever.
    """

    in_flight_s: float = 0.5
    memory_s: float = 1.0
    most_window: int = 8 << 30
    read_s: float = 0.03
    bounce: int = 32 << 20
    gain: float = 2.0
    gain_s: float = 0.05
    lost: float = 4.0
    lost_s: float = 0.5


PACE = Pace()
QUANTA = 4
"""A window is asked for in so many chunks at least, so that one is under way while another is being verified."""


@dataclass(slots=True, eq=False)
class _Pair:
    """A flight that was asked for twice.

    Attributes:
        second: the repetition, or ``None``.
        landed: the repetition is verified, in its bounce buffer.
        quiet: the first writer is gone: nobody writes to the leaves' memory.
    """

    second: Flight
    landed: bool = False
    quiet: bool = False


class Schedule:
    """One load from any number of peers. Not thread-safe: the driver locks.

    Args:
        leaves: all of the shard.
        missing: indices of those that are to be fetched.
        chunk_bytes: what one read asks for unless the lane says otherwise; a single leaf may be larger.
        pace: see :class:`Pace`.

    Attributes:
        retries: flights that did not arrive and had to be asked for again.
        duplicated: bytes that were asked for a second time in the end game.
        bounce: see :class:`Pace`; may be set before the first claim.
    """

    def __init__(self, leaves: Sequence[Leaf], missing: Iterable[int], chunk_bytes: int, pace: Pace = PACE) -> None:
        self.retries = 0
        self.duplicated = 0
        self.bounce = pace.bounce
        self._leaves = leaves
        self._chunk_bytes = chunk_bytes
        self._pace = pace
        self._all = (1 << len(leaves)) - 1
        self._wanted = mask_of(missing)
        self._missing = self._wanted
        self._missing_bytes = sum(leaves[run[-1]].span.end - leaves[run[0]].span.offset for run in runs(self._wanted))
        self._verified = 0
        self._peers: list[Peer] = []
        self._pairs: dict[Flight, _Pair] = {}
        self._bounced = 0
        self._fencing: set[Lane] = set()
        self._lost_s = pace.lost_s
        self._shares = Shares(leaves, chunk_bytes)

    # ---- what there is

    @property
    def finished(self) -> bool:
        """Whether every leaf that was missing is verified and in place."""
        return self._verified == self._wanted

    @property
    def verified(self) -> int:
        """The leaves that may be counted, or offered to others, as bits."""
        return self._verified

    @property
    def unverified(self) -> int:
        """The wanted leaves that are not verified yet, as bits."""
        return self._wanted & ~self._verified

    @property
    def extent(self) -> range:
        """From the first leaf that is to be fetched to the last one."""
        if not self._wanted:
            return range(0)
        return range(lowest(self._wanted), self._wanted.bit_length())

    @property
    def chunks(self) -> int:
        """About how many reads the leaves are that nobody was asked for."""
        return -(-self._missing_bytes // self._chunk_bytes)

    # ---- peers

    def join(self, lanes: int, now: float, have: int | None = None, share: Share = EVERYTHING) -> int:
        """A further peer; its number.

        Args:
            lanes: how many connections to it there will be.
            now: the time.
            have: the leaves that it can serve, as bits; ``None`` for all.
            share: those for which it is the one to ask, while it is there; see above.
        """
        held = self._all if have is None else have
        self._peers.append(
            Peer(lanes=lanes, have=held, share=self._shares.bits(share), since=now, joined=now, brought=now)
        )
        return len(self._peers) - 1

    def offers(self, peer: int, leaves: int) -> None:
        """A peer can serve ``leaves`` (bits) too."""
        self._peers[peer].have |= leaves & self._all

    def drop(self, peer: int) -> None:
        """A peer is asked for nothing any more; what it owes comes back as its lanes are released."""
        self._peers[peer].dropped = True

    def speed(self, peer: int, now: float) -> float:
        """Bytes a second, as measured lately; 0 where nothing arrived yet."""
        return self._peers[peer].speed(now)

    def may_claim(self, peer: int) -> bool:
        """Whether some leaf is left that this peer could be asked for."""
        known = self._peers[peer]
        return not known.dropped and bool(self._free(known))

    # ---- a lane's round

    def claim(self, lane: Lane, now: float, most: int = 0) -> Flight | None:
        """What ``lane`` is to fetch next, or ``None`` for nothing now; ask again soon.

        Args:
            lane: of a peer that joined.
            now: the time.
            most: bytes that one read may ask for; ``chunk_bytes`` if that is more.
        """
        peer = self._peers[lane.peer]
        if peer.dropped or lane in self._fencing:
            return None
        if self._missing:
            return self._first(peer, lane, now, max(most, self._chunk_bytes))
        return self._again(peer, lane, now)

    def arrived(self, flight: Flight, now: float) -> Next:
        """``flight`` is verified where it was read to, and its read is over. Legal until its lane is released."""
        self._peers[flight.lane.peer].delivered(flight, now, self._pace.memory_s)
        if flight.twin is not None:
            return self._landed(flight, flight.twin)
        self._verified |= flight.mask
        pair = self._pairs.pop(flight, None)
        if pair is None or not pair.landed:
            return Next()
        self._bounced -= pair.second.span.nbytes
        return Next(drop=(pair.second,))

    def refused(self, flight: Flight) -> Next:
        """``flight``'s peer does not have it yet, so nothing was written; it is not asked for that again unasked."""
        peer = self._peers[flight.lane.peer]
        peer.have &= ~flight.mask
        return self._back(peer, flight)

    def released(self, lane: Lane) -> Next:
        """Nothing that ``lane`` was asked for is being written any more, nor will be: it finished or was fenced."""
        peer, copy = self._peers[lane.peer], list[Flight]()
        outrun = lane in self._fencing
        self._fencing.discard(lane)
        for flight in [each for each in peer.flights if each.lane == lane]:
            peer.late |= flight.mask if outrun and flight.twin is None and flight not in self._pairs else 0
            copy += self._back(peer, flight).copy
        return Next(copy=tuple(copy))

    def copied(self, flight: Flight) -> None:
        """A flight that ``Next.copy`` named is in place."""
        assert flight.twin is not None
        pair = self._pairs.pop(flight.twin)
        assert pair.landed
        assert pair.quiet, "copied under a writer"
        self._bounced -= flight.span.nbytes
        self._verified |= flight.mask

    def overdue(self, lane: Lane, now: float) -> Next:
        """Lanes that hold up the end and cannot be helped by bounce buffers. For a lane that has nothing to do.

        What they owe can be asked of ``lane``'s peer once they were fenced and released.
        """
        peer = self._peers[lane.peer]
        if self._missing or peer.dropped or not peer.moved:
            return Next()
        room = self.bounce - self._bounced
        late = [
            flight.lane
            for flight, left in self._owed(peer, now)
            if (flight.span.nbytes > room or self._is_landed(flight))
            and left > self._pace.lost * self._cost(peer, flight, now) + self._lost_s
        ]
        self._lost_s *= 2 if late else 1
        return self._fence(late)

    # ---- inside

    def _first(self, peer: Peer, lane: Lane, now: float, most: int) -> Flight | None:
        if not peer.moved and any(each.lane == lane for each in peer.flights):
            return None
        free = self._free(peer)
        if peer.share != self._all:
            free = self._shares.due(peer, self._peers, free, now)
        if not free:
            return None
        window = self._window(peer, now)
        # The first read shows the speed: a chain of relays waits for it at every link, and never makes up for it.
        most = min(most, self._grain(peer), window // QUANTA) if peer.moved else self._chunk_bytes // QUANTA
        first, count = _run(self._leaves, free, most)
        flight = self._flight(lane, first, count)
        if peer.owes and peer.owes + flight.span.nbytes > window:
            return None
        self._missing &= ~flight.mask
        self._missing_bytes -= flight.span.nbytes
        peer.asked(flight, now)
        return flight

    def _grain(self, peer: Peer) -> int:
        return max(self._chunk_bytes, int(self._pace.read_s * peer.moved / peer.busy))

    def _free(self, peer: Peer) -> int:
        """What it may be asked for: not what was taken from it while another could bring that."""
        free = self._missing & peer.have
        if free & ~peer.late:
            return free & ~peer.late
        for other in self._peers:
            if free and not other.dropped and other is not peer:
                free &= ~other.have | other.late
        return free

    def _back(self, peer: Peer, flight: Flight) -> Next:
        """``flight`` will not arrive, and nobody writes to its leaves any more."""
        peer.forget(flight)
        self.retries += 1
        if flight.twin is not None:
            self._lose_second(flight, flight.twin)
        elif (pair := self._pairs.get(flight)) is None:
            self._miss(flight)
        else:
            pair.quiet = True
            return Next(copy=(pair.second,) if pair.landed else ())
        return Next()

    def _miss(self, flight: Flight) -> None:
        self._missing |= flight.mask
        self._missing_bytes += flight.span.nbytes

    def _window(self, peer: Peer, now: float) -> int:
        """Bytes in flight at most (one leaf always may be): less towards the end, so that peers end together."""
        speed = peer.speed(now)
        if not speed:
            return peer.lanes * self._chunk_bytes
        longest = self._pace.in_flight_s
        left_s = self._missing_bytes / sum(each.speed(now) for each in self._peers if not each.dropped)
        return min(int(speed * min(longest, max(left_s, longest / 5))), self._pace.most_window)

    def _flight(self, lane: Lane, first: int, count: int, twin: Flight | None = None) -> Flight:
        begin = self._leaves[first].span.offset
        return Flight(lane, first, count, Span(begin, self._leaves[first + count - 1].span.end - begin), twin)

    def _again(self, peer: Peer, lane: Lane, now: float) -> Flight | None:
        """The end game: what would arrive latest, if this peer brings it much sooner."""
        room = self.bounce - self._bounced
        found: tuple[float, Flight] | None = None
        for flight, left in self._owed(peer, now):
            fits = flight.span.nbytes <= room and not self._is_landed(flight)
            sooner = self._pace.gain_s if peer.moved else self._pace.lost_s
            pays = left > self._pace.gain * self._cost(peer, flight, now) + sooner
            if fits and pays and (found is None or left > found[0]):
                found = left, flight
        if found is None or (peer.owes and peer.owes + found[1].span.nbytes > self._window(peer, now)):
            return None
        second = self._flight(lane, found[1].first, found[1].count, found[1])
        self._pairs[found[1]] = _Pair(second)
        self._bounced += second.span.nbytes
        self.duplicated += second.span.nbytes
        peer.asked(second, now)
        return second

    def _owed(self, peer: Peer, now: float) -> Iterator[tuple[Flight, float]]:
        """What others owe that ``peer`` has, and in how many seconds it should come; not what is on its way twice."""
        for other in self._peers:
            if other is peer or not other.flights:
                continue
            ahead = 0
            for flight in other.flights:
                ahead += flight.span.nbytes
                pair = self._pairs.get(flight)
                helped = flight.lane in self._fencing or (pair is not None and not pair.landed)
                if flight.twin is None and not helped and not flight.mask & ~peer.have:
                    yield flight, other.left(ahead, now)

    def _cost(self, peer: Peer, flight: Flight, now: float) -> float:
        """Seconds after which ``peer`` would bring it; one that brought nothing yet counts as good as the best."""
        speed = peer.speed(now) or max(each.speed(now) for each in self._peers)
        return (peer.owes + flight.span.nbytes) / speed if speed else 0.0

    def _is_landed(self, flight: Flight) -> bool:
        pair = self._pairs.get(flight)
        return pair is not None and pair.landed

    def _landed(self, second: Flight, first: Flight) -> Next:
        pair = self._pairs.get(first)
        if pair is None or pair.second is not second:  # the first one arrived meanwhile
            self._bounced -= second.span.nbytes
            return Next(drop=(second,))
        pair.landed = True
        if pair.quiet:
            return Next(copy=(second,))
        owed = [each for each in self._peers[first.lane.peer].flights if each.lane == first.lane]
        return self._fence([first.lane] if all(map(self._is_landed, owed)) else [])

    def _lose_second(self, second: Flight, first: Flight) -> None:
        self._bounced -= second.span.nbytes
        pair = self._pairs.get(first)
        if pair is not None and pair.second is second:
            del self._pairs[first]
            if pair.quiet:
                self._miss(second)

    def _fence(self, lanes: Iterable[Lane]) -> Next:
        new = tuple(lane for lane in dict.fromkeys(lanes) if lane not in self._fencing)
        self._fencing.update(new)
        return Next(fence=new)


def _run(leaves: Sequence[Leaf], free: int, most: int) -> tuple[int, int]:
    """The first neighbours among ``free``, ``most`` bytes of them, or one leaf."""
    first = lowest(free)
    rest = free >> first
    neighbours = lowest(~rest)
    begin, count = leaves[first].span.offset, 1
    while count < neighbours and leaves[first + count].span.end - begin <= most:
        count += 1
    return first, count
