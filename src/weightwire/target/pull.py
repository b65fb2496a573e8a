"""Pull the missing leaves from one or several peers, verify each, and take over from peers that fail.

A peer may be a *relay*, which is itself still filling: it is asked for what it says that it has.

One thread drives one connection (a *lane*): it keeps a few reads under way. What arrived is digested while it is still
in cache: as it comes where reads grow, else in a thread beside. All lanes share one ``schedule.Schedule``, which says
who reads what. A lane that ends for whatever reason first fences its connection, and only then gives its chunks back:
no leaf ever has two writers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from weightwire.errors import AuthError, DigestMismatch, FenceTimeout, NotYet, PeerStalled, TransferError
from weightwire.manifest.provisional import Expected
from weightwire.target.bounce import Bounce
from weightwire.target.checks import Checks
from weightwire.target.pacing import patience_s
from weightwire.target.peers import Bounds, NoDerivedError, NothingNewError, PeerShare, PullReport, Session
from weightwire.target.schedule import Flight, Lane, Schedule
from weightwire.target.verification import Verification
from weightwire.target.work import Work
from weightwire.transport.base import (
    Connection,
    DigestingRead,
    GrowingRead,
    Read,
    Registration,
    step_bytes,
    streams_that_pay,
    worthwhile_bytes,
)
from weightwire.transport.memory import HOST

log = logging.getLogger(__name__)

READ_S = 0.03
"""What one read into a device should take: there, asking, launching and waiting cost more than the bytes of a chunk."""
MAX_READ_BYTES = 1024 * 1024 * 1024

IDLE_S = 0.05
"""Between two looks of a lane that has nothing to do: whether another one is late."""

LIVELY_S = 2.0
FIRST_S = 0.5
"""A relay that delivered nothing for so long (at first: since it was joined), and has nothing new, is not relied upon:
others are read beside it."""

_CONDEMNED: list[object] = []
"""Memory that a peer may still write to: kept for the life of the process, never refilled."""


class Pull:
    """One load of one shard. Use once.

    Args:
        manifest: what the bytes must be.
        into: transport name -> registration of the target's memory over the manifest's logical byte string.
        schedule: of the leaves to fetch; used by this pull alone.
        bounds: see :class:`Bounds`.
        arrived: called with the number of newly verified bytes, from lane threads.
        verified: called with leaves (bits) that are verified and in place for good, from lane threads.
    """

    def __init__(
        self,
        manifest: Expected,
        into: Mapping[str, Registration],
        schedule: Schedule,
        bounds: Bounds,
        arrived: Callable[[int], None] = lambda _: None,
        verified: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.manifest = manifest
        self.into = into
        self.work = Work(schedule, next(iter(into.values())).memory)
        self.verification = Verification(manifest, schedule.extent)
        self.bounds = bounds
        self.arrived = arrived
        self.verified = verified
        self.report = PullReport()
        self.lock = threading.Lock()
        self.wake = threading.Event()
        self.peers: list[_PeerPull] = []

    def run(self, sessions: Iterator[Session | None]) -> PullReport:
        """Fetch everything. ``sessions`` yields peers, best first; the next is opened when one fails or there is room.

        It may yield ``None`` for nobody at the moment, and is asked again soon; at its end there will be nobody else.

        Returns once all leaves are verified and every connection is fenced.

        Raises:
            TransferError: the last peer's error when none is left, or the load's deadline passed.
            FenceTimeout: a peer could not be stopped; the memory is condemned and must not be refilled.
        """
        started = time.monotonic()
        try:
            self._supervise(sessions)
        finally:
            for peer in self.peers:
                peer.stop()
            self.report.seconds = time.monotonic() - started
            self.report.retries, self.report.duplicated = self.work.retries, self.work.duplicated
            self._condemn()
            self.peers = []  # they refer to this pull: the memory is not to wait for the collector of cycles
        return self.report

    def settle(self, flights: Iterable[Flight]) -> None:
        """``flights`` are verified and in place."""
        for flight in flights:
            with self.lock:
                self.peers[flight.lane.peer].share.nbytes += flight.span.nbytes
            self.arrived(flight.span.nbytes)
            self.verified(flight.mask)
        if self.work.finished:
            self.wake.set()

    def fence(self, lanes: Iterable[Lane]) -> None:
        """End connections whose chunks have arrived from elsewhere, or will; their own threads give the chunks back."""
        for lane in lanes:
            self.peers[lane.peer].outrun(lane)

    def _supervise(self, sessions: Iterator[Session | None]) -> None:
        ended = False
        while not self.work.finished and not any(peer.condemned for peer in self.peers):
            self.wake.clear()
            session = None
            if not ended and len(self.reading) < self.bounds.peers:
                session = next(sessions, _END)
                ended = session is _END
            if isinstance(session, _End):
                continue
            if session is not None:
                self._join(session)
                continue
            if ended and not any(peer.running for peer in self.peers):
                raise _last_error(self.peers)
            self._mind()
            if time.monotonic() > self.bounds.deadline:
                raise PeerStalled(
                    "the load did not finish in time", "raise WEIGHTWIRE_LOAD_TIMEOUT or look at the link"
                )
            self.wake.wait(0.25)

    @property
    def reading(self) -> list[_PeerPull]:
        """The peers that are asked for more."""
        return [peer for peer in self.peers if peer.running and not peer.retired]

    def _join(self, session: Session) -> None:
        self.peers.append(_PeerPull(self, session))
        self.peers[-1].start()
        self.verification.prepare(self.into[session.transport].memory)

    def _mind(self) -> None:
        """Let go of relays that have had nothing new for long, and of what nobody has any more."""
        reading = self.reading
        for peer in reading:
            peer.check_growth()
        unverified = self.work.unverified
        if reading and unverified and not any(peer.session.limit & unverified for peer in reading):
            raise NoDerivedError("no peer holds the derived tensors that were planned", "another one's are taken")

    def _condemn(self) -> None:
        condemned = [peer.share.peer for peer in self.peers if peer.condemned]
        if condemned:
            _CONDEMNED.append(tuple(self.into.values()))
            raise FenceTimeout(
                f"peer {condemned[0]} could not be stopped from writing", "start this process again; its memory is kept"
            )


class _PeerPull:
    """All lanes of one peer. ``start`` it once it is known to the pull."""

    def __init__(self, pull: Pull, session: Session) -> None:
        self.pull = pull
        self.session = session
        self.share = PeerShare(peer=session.label, relay=session.relaying)
        self.stopping = threading.Event()
        self.retired = False
        self.condemned = False
        self.lanes: dict[Lane, _Lane] = {}
        self.ended = 0
        self.quiet = threading.Condition(pull.lock)
        pull.report.shares.append(self.share)
        count = min(pull.bounds.lanes, session.lanes, max(len(pull.work), 1))
        self.number = pull.work.join(count, 0 if session.growing else session.limit, session.share)
        self.has = 0 if session.growing else session.limit
        self.delivered = self.grown = time.monotonic()
        self.threads = [self._thread(n) for n in range(count)]

    def _thread(self, number: int) -> threading.Thread:
        lane = Lane(self.number, number)
        return threading.Thread(target=self._lane, args=(lane,), name=f"weightwire-lane-{number}", daemon=True)

    def start(self) -> None:
        self.session.watch(self.fail, self.offers)
        for thread in tuple(self.threads):  # the first may add to them
            thread.start()

    def _widen(self, streams: int) -> None:
        """More lanes, where the first connection shows that they pay."""
        streams = min(streams, self.pull.bounds.lanes, max(len(self.pull.work), 1))
        with self.pull.lock:
            more = [self._thread(number) for number in range(len(self.threads), streams)]
            self.threads += more
        for thread in more:
            thread.start()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    @property
    def useful(self) -> bool:
        """Whether what is missing may come from it soon; a relay that has nothing new is a while."""
        lively = LIVELY_S if self.share.nbytes else FIRST_S
        new = not self.session.growing or time.monotonic() - self.delivered < lively
        return new or self.pull.work.may_claim(self.number)

    def offers(self, leaves: int) -> None:
        """It has ``leaves`` (bits) from now on."""
        self.grown, self.has = time.monotonic(), self.has | leaves
        self.pull.work.offers(self.number, leaves)

    @property
    def complete(self) -> bool:
        """Whether it has all that it may ever be asked for."""
        return self.has == self.session.limit

    def check_growth(self) -> None:
        """Drop a relay that has had nothing new for longer than a peer may be silent."""
        quiet = time.monotonic() - max(self.grown, self.delivered)
        if self.session.growing and quiet > self.pull.bounds.growth_s and not self.useful:
            self.fail(NothingNewError(f"peer {self.share.peer} had nothing new for {quiet:.0f} s", "read elsewhere"))

    def retire(self) -> None:
        """Ask it for nothing more; it ends when what it was asked for has arrived."""
        log.info("peer %s is left in peace: others deliver", self.share.peer)
        self.retired = True
        self.pull.work.drop(self.number)

    def patience_s(self, outstanding: int) -> float:
        """How long one lane waits for ``outstanding`` bytes."""
        return patience_s(self.pull.bounds.stall_s, outstanding, self.session.rate / len(self.threads))

    def stop(self) -> None:
        """End every lane; returns when they have ended or the fence bound has passed (then the memory is condemned)."""
        finished = self.pull.work.finished
        self.stopping.set()
        for lane in self._open_lanes():
            if not finished or lane.under_way:  # what is under way at the end goes to bounce buffers only
                self._fence(lane)
        with self.quiet:  # a thread that is still connecting has asked for nothing, and will not
            if not self.quiet.wait_for(lambda: not self.lanes, self.pull.bounds.fence_s):
                self.condemned = True
                _CONDEMNED.extend(self.lanes.values())

    def fail(self, error: TransferError | AuthError) -> None:
        """Drop the peer: the first error is kept, every lane is fenced."""
        self.pull.work.drop(self.number)
        with self.pull.lock:
            first = self.share.error is None
            if first:
                self.share.error = error
            if isinstance(error, DigestMismatch):
                self.share.bad_leaves += 1
        if first and not self.stopping.is_set():
            log.warning("peer %s dropped: %s", self.share.peer, error)
        self.stopping.set()
        for lane in self._open_lanes():
            self._fence(lane)
        self.pull.wake.set()

    def outrun(self, lane: Lane) -> None:
        """End one lane: what it owes is no longer needed from it. It may connect again should there be more to do."""
        with self.pull.lock:
            late = self.lanes.get(lane)
            self.share.outrun += 1
        if late is not None:
            log.info("peer %s is much slower than others: what it owes is taken elsewhere", self.share.peer)
            late.outrun = True
            self._fence(late)

    def _open_lanes(self) -> list[_Lane]:
        with self.pull.lock:
            return list(self.lanes.values())

    def _fence(self, lane: _Lane) -> bool:
        try:
            lane.connection.fence(time.monotonic() + self.pull.bounds.fence_s)
        except FenceTimeout as error:
            log.error("%s", error)  # noqa: TRY400  (the one-line error is the message; its traceback says nothing)
            self.condemned = True
            _CONDEMNED.append(lane)  # bounce buffers too
            self.pull.wake.set()
            return False
        return True

    def _lane(self, lane: Lane) -> None:
        while self._serve(lane) and self._needed():
            pass
        with self.pull.lock:
            self.ended += 1
        if self.retired and self.ended == len(self.threads):
            self.session.close()  # its place is another's

    def _needed(self) -> bool:
        """Wait until there is something to claim again; false if that will not be."""
        while not self.stopping.is_set() and not self.retired and not self.pull.work.wait(self.number, IDLE_S):
            if self.pull.work.may_claim(self.number):
                return True
        return False

    def _serve(self, lane: Lane) -> bool:
        """One connection, start to end; true if it ended only because others were faster."""
        try:
            soon = time.monotonic() + self.pull.bounds.stall_s
            connection = self.session.connect(min(self.pull.bounds.deadline, soon))
        except (TransferError, AuthError) as error:
            self.fail(error)
            return False
        self._widen(streams_that_pay(connection))
        driven = _Lane(self, connection, lane)
        with self.pull.lock:
            self.lanes[lane] = driven
            self.share.path = connection.path
        try:
            driven.drive()
        except (TransferError, AuthError) as error:
            if not driven.outrun and not self.pull.work.finished:
                self.fail(error)
        finally:
            with self.pull.lock:
                self.share.path = connection.path  # some know it only once they have read
            if self._fence(driven):
                self._give_back(driven)
            self.pull.wake.set()
        return driven.outrun

    def _give_back(self, driven: _Lane) -> None:
        """Legal once the connection is fenced."""
        self.pull.settle(self.pull.work.released(driven.lane))
        with self.quiet:
            del self.lanes[driven.lane]
            self.quiet.notify_all()


class _Lane:
    """One connection's loop: claim, read, verify."""

    def __init__(self, peer: _PeerPull, connection: Connection, lane: Lane) -> None:
        self.peer = peer
        self.pull = peer.pull
        self.verification = peer.pull.verification
        self.connection = connection
        self.lane = lane
        self.outrun = False
        self.into = self.pull.into[peer.session.transport]
        self.under_way: deque[tuple[Flight, Read, Bounce | None]] = deque()
        devices = {device == HOST for device in self.into.memory.devices()}
        self.on_device, self.on_host = devices == {False}, devices <= {True}
        self.together = worthwhile_bytes(connection)  # bytes of chunks that one read asks for
        self.step = step_bytes(connection)
        self.checks = Checks(self._check_aside)

    def drive(self) -> None:
        with self.checks:  # nothing looks at the memory any more once the lane is given back
            self._drive()

    def _drive(self) -> None:
        work = self.pull.work
        while not self.peer.stopping.is_set() and not self.outrun:
            self._fill()
            if self.under_way:
                self._finish_first()
            elif self.peer.retired or work.wait(self.lane.peer, IDLE_S):
                return
            else:
                self.pull.fence(work.overdue(self.lane))

    def _fill(self) -> None:
        while len(self.under_way) < self.connection.depth:
            flight = self.pull.work.claim(self.lane, self.together)
            if flight is None:
                return
            bounce = Bounce(flight.span) if flight.twin else None
            self.under_way.append((flight, self.connection.read(flight.span, bounce or self.into), bounce))

    def _finish_first(self) -> None:
        flight, read, bounce = self.under_way[0]
        began = time.monotonic()
        stalled = began + self.peer.patience_s(sum(other.span.nbytes for other, _, _ in self.under_way))
        deadline = min(self.pull.bounds.deadline, stalled)
        try:
            if self.on_host and bounce is None and isinstance(read, GrowingRead):
                self.check_as_it_comes(flight, read, deadline)
                self.under_way.popleft()
            else:
                read.wait(deadline)
                arrived = time.monotonic()
                self.under_way.popleft()
                check = self.checks.add if self.on_host else self._check
                check(flight, bounce, arrived - began)
        except NotYet as error:  # nothing was written; what it has will be told
            log.info("%s", error)
            self.under_way.popleft()
            self.pull.settle(self.pull.work.refused(flight))
            return
        self._adapt(flight.span.nbytes, time.monotonic() - began)

    def check_as_it_comes(self, flight: Flight, read: GrowingRead, deadline: float) -> None:
        """Digest what comes while it is in cache and while the wire brings the next."""
        arriving = None
        if isinstance(read, DigestingRead):
            arriving = self.verification.arriving(self.into.memory, flight.leaves)
        if arriving is None:
            self._check_by_step(flight, read, deadline)
            return
        assert isinstance(read, DigestingRead)
        began = time.monotonic()
        read.wait_digested(arriving, deadline)
        self.verification.compare(arriving.digests(), flight.leaves, self.peer.share.peer)
        self.settle(flight, None, time.monotonic() - began - arriving.hashing_s, arriving.hashing_s)

    def _check_by_step(self, flight: Flight, read: GrowingRead, deadline: float) -> None:
        wire_s = verify_s = 0.0
        leaves = self.pull.manifest.layout.leaves
        first = flight.first
        for leaf in flight.leaves:
            end = leaves[leaf].span.end
            if end - leaves[first].span.offset < self.step and end < flight.span.end:
                continue
            began = time.monotonic()
            read.wait_for(end - flight.span.offset, deadline)
            arrived = time.monotonic()
            self.verification.check(self.into.memory, range(first, leaf + 1), self.peer.share.peer)
            wire_s += arrived - began
            verify_s += time.monotonic() - arrived
            first = leaf + 1
        self.settle(flight, None, wire_s, verify_s)

    def _check(self, flight: Flight, bounce: Bounce | None, wire_s: float) -> None:
        began = time.monotonic()
        self._verify(flight, bounce)
        self.settle(flight, bounce, wire_s, time.monotonic() - began)

    def _check_aside(self, flight: Flight, bounce: Bounce | None, wire_s: float) -> None:
        """In the digest's thread: the lane itself may be waiting for the next bytes."""
        try:
            self._check(flight, bounce, wire_s)
        except DigestMismatch as error:
            self.peer.fail(error)

    def settle(self, flight: Flight, bounce: Bounce | None, wire_s: float, verify_s: float) -> None:
        """``flight`` is right."""
        settled, late = self.pull.work.arrived(flight, bounce)
        self.peer.delivered = time.monotonic()
        with self.pull.lock:
            self.pull.report.wire_s += wire_s
            self.pull.report.verify_s += verify_s
        self.pull.settle(settled)
        self.pull.fence(late)

    def _verify(self, flight: Flight, bounce: Bounce | None) -> None:
        if bounce is None:
            self.verification.check(self.into.memory, flight.leaves, self.peer.share.peer)
        else:
            self.verification.check_bounce(bounce, flight.leaves, self.peer.share.peer)

    def _adapt(self, nbytes: int, seconds: float) -> None:
        """Larger reads while they are quick, on a device; on the host a chunk is verified while it is in cache."""
        if self.on_device and seconds < READ_S:
            self.together = min(max(self.together, 4 * nbytes), MAX_READ_BYTES)
        elif seconds > 4 * READ_S:
            self.together //= 2


class _End:
    """Nobody else will come."""


_END = _End()


def _last_error(active: list[_PeerPull]) -> TransferError:
    errors = [peer.share.error for peer in active if peer.share.error is not None]
    if not errors:
        return TransferError("no peer is left to read from", "see the reasons above")
    last = max(errors, key=lambda error: not isinstance(error, NothingNewError))  # that one had a reason of its own
    return last if isinstance(last, TransferError) else TransferError(last.problem, last.remedy)
