"""Pull the missing leaves from one or several peers, verify each, and take over from peers that fail.

One thread drives one connection (a *lane*): it keeps a few reads under way, and digests what arrived while it is still
in cache. All lanes share one :class:`~weightwire.target.worklist.WorkList`. A lane that ends for whatever reason first
fences its connection, and only then gives its chunks back: no leaf ever has two writers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from weightwire.errors import AuthError, DigestMismatch, FenceTimeout, PeerStalled, TransferError
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.digest import LeafDigests
from weightwire.manifest.records import DIGEST_BYTES, Manifest
from weightwire.target.worklist import Chunk, WorkList
from weightwire.transport.base import Connection, Read, Registration

log = logging.getLogger(__name__)

SLOWEST_RATE = 1024 * 1024
"""Bytes a second below which a peer counts as stalled (added to the stall bound for what is outstanding)."""

READ_S = 0.03
"""What one read into a device should take: there, asking, launching and waiting cost more than the bytes of a chunk."""
MAX_READ_BYTES = 1024 * 1024 * 1024

STALL_BYTES = 64 * 1024 * 1024
"""Most outstanding bytes that lengthen the stall bound: where reads have grown beyond, the link is a fast one."""

_CONDEMNED: list[object] = []
"""Memory that a peer may still write to: kept for the life of the process, never refilled."""


class Session(Protocol):
    """One peer under a read lease, as the pull needs it."""

    @property
    def label(self) -> str:
        """How logs and reports name the peer."""
        ...

    @property
    def transport(self) -> str:
        """Name of the transport that reads from it."""
        ...

    @property
    def lanes(self) -> int:
        """How many connections to it pay."""
        ...

    def connect(self, deadline: float) -> Connection:
        """One more connection to the peer; raises TransferError or AuthError."""
        ...

    def watch(self, failed: Callable[[TransferError], None]) -> None:
        """Call ``failed``, from any thread, when the peer is known to be of no more use; returns at once."""
        ...


@dataclass(kw_only=True)
class PeerShare:
    """What one peer contributed. Written by its lanes under the pull's lock.

    Attributes:
        peer: its label.
        path: what carried the bytes, for instance ``tcp`` or ``nixl/ucx:cma``.
        nbytes: verified bytes from it.
        bad_leaves: leaves that arrived with a wrong digest.
        error: why it was dropped, or ``None``.
    """

    peer: str
    path: str = ""
    nbytes: int = 0
    bad_leaves: int = 0
    error: TransferError | AuthError | None = None


@dataclass(kw_only=True)
class PullReport:
    """What a pull did. ``verify_s`` and ``wire_s`` are summed over lanes, so they may exceed the wall time."""

    seconds: float = 0.0
    wire_s: float = 0.0
    verify_s: float = 0.0
    retries: int = 0
    shares: list[PeerShare] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How long a pull may take, and how much it does at a time.

    Attributes:
        deadline: ``time.monotonic()`` value for the whole load.
        stall_s: seconds without a finished read after which a peer is dropped.
        fence_s: seconds that a fence may take.
        lanes: most connections to one peer.
        peers: peers read from at a time.
    """

    deadline: float
    stall_s: float = 10.0
    fence_s: float = 10.0
    lanes: int = 4
    peers: int = 3


class Pull:
    """One load of one shard. Use once.

    Args:
        manifest: what the bytes must be.
        into: transport name -> registration of the target's memory over the manifest's logical byte string.
        work: the chunks to fetch.
        bounds: see :class:`Bounds`.
        arrived: called with the number of newly verified bytes, from lane threads.
    """

    def __init__(
        self,
        manifest: Manifest,
        into: Mapping[str, Registration],
        work: WorkList,
        bounds: Bounds,
        arrived: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.manifest = manifest
        self.into = into
        self.work = work
        self.extent = work.extent
        self.bounds = bounds
        self.arrived = arrived
        self.report = PullReport()
        self.lock = threading.Lock()
        self.wake = threading.Event()
        self._making = threading.Lock()
        self._digests: tuple[range, LeafDigests] | None = None

    def run(self, sessions: Iterator[Session]) -> PullReport:
        """Fetch everything. ``sessions`` yields peers, best first; the next is opened when one fails or there is room.

        Returns once all leaves are verified and every connection is fenced.

        Raises:
            TransferError: the last peer's error when none is left, or the load's deadline passed.
            FenceTimeout: a peer could not be stopped; the memory is condemned and must not be refilled.
        """
        started = time.monotonic()
        active: list[_PeerPull] = []
        try:
            self._supervise(sessions, active)
        finally:
            for peer in active:
                peer.stop()
            self.report.seconds = time.monotonic() - started
            self.report.retries = self.work.retries
            self._condemn(active)
        return self.report

    def verify(self, memory: AddressSpace, leaves: range, peer: str) -> None:
        """Compare what arrived with the manifest.

        Raises:
            BadLeaf: the first leaf that differs; ``peer`` sent it.
        """
        extent, digests = self.prepare(memory)
        found = digests.of(range(leaves.start - extent.start, leaves.stop - extent.start))
        if found != self.manifest.digests[leaves.start * DIGEST_BYTES : leaves.stop * DIGEST_BYTES]:
            for at, index in enumerate(leaves):
                if found[at * DIGEST_BYTES :][:DIGEST_BYTES] != self.manifest.digest(index):
                    raise BadLeaf(peer, index)

    def prepare(self, memory: AddressSpace) -> tuple[range, LeafDigests]:
        """What digests this pull's leaves, made once: where lanes connect meanwhile it costs them nothing."""
        with self._making:
            if self._digests is None:
                extent = self.extent
                leaves = self.manifest.layout.leaves[extent.start : extent.stop]
                self._digests = extent, LeafDigests(memory, leaves)
            return self._digests

    def _supervise(self, sessions: Iterator[Session], active: list[_PeerPull]) -> None:
        exhausted = False
        while not self.work.finished and not any(peer.condemned for peer in active):
            self.wake.clear()
            running = [peer for peer in active if peer.running]
            if not exhausted and len(running) < self.bounds.peers:
                session = next(sessions, None)
                exhausted = session is None
                if session is not None:
                    active.append(_PeerPull(self, session))
                    self.prepare(self.into[session.transport].memory)
                continue
            if not running:
                raise _last_error(active)
            if time.monotonic() > self.bounds.deadline:
                raise PeerStalled(
                    "the load did not finish in time", "raise WEIGHTWIRE_LOAD_TIMEOUT or look at the link"
                )
            self.wake.wait(0.25)

    def _condemn(self, active: list[_PeerPull]) -> None:
        condemned = [peer.share.peer for peer in active if peer.condemned]
        if condemned:
            _CONDEMNED.append(tuple(self.into.values()))
            raise FenceTimeout(
                f"peer {condemned[0]} could not be stopped from writing", "start this process again; its memory is kept"
            )


class _PeerPull:
    """All lanes of one peer."""

    def __init__(self, pull: Pull, session: Session) -> None:
        self.pull = pull
        self.session = session
        self.share = PeerShare(peer=session.label)
        self.stopping = threading.Event()
        self.condemned = False
        self.connections: list[Connection] = []
        pull.report.shares.append(self.share)
        self.threads = [
            threading.Thread(target=self._lane, name=f"weightwire-lane-{n}", daemon=True)
            for n in range(min(pull.bounds.lanes, session.lanes, max(len(pull.work), 1)))
        ]
        session.watch(self.fail)
        for thread in self.threads:
            thread.start()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def stop(self) -> None:
        """End every lane; returns when they have ended or the fence bound has passed (then the memory is condemned)."""
        self.stopping.set()
        if not self.pull.work.finished:
            self._fence_all()
        until = time.monotonic() + self.pull.bounds.fence_s
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        self.condemned = self.condemned or self.running

    def fail(self, error: TransferError | AuthError) -> None:
        """Drop the peer: the first error is kept, every lane is fenced."""
        with self.pull.lock:
            first = self.share.error is None
            if first:
                self.share.error = error
            if isinstance(error, DigestMismatch):
                self.share.bad_leaves += 1
        if first and not self.stopping.is_set():
            log.warning("peer %s dropped: %s", self.share.peer, error)
        self.stopping.set()
        self._fence_all()
        self.pull.wake.set()

    def _fence_all(self) -> None:
        with self.pull.lock:
            connections = list(self.connections)
        for connection in connections:
            self._fence(connection)

    def _fence(self, connection: Connection) -> bool:
        try:
            connection.fence(time.monotonic() + self.pull.bounds.fence_s)
        except FenceTimeout as error:
            log.error("%s", error)  # noqa: TRY400  (the one-line error is the message; its traceback says nothing)
            self.condemned = True
            return False
        return True

    def _lane(self) -> None:
        try:
            soon = time.monotonic() + self.pull.bounds.stall_s
            connection = self.session.connect(min(self.pull.bounds.deadline, soon))
        except (TransferError, AuthError) as error:
            self.fail(error)
            return
        with self.pull.lock:
            self.connections.append(connection)
            self.share.path = connection.path
        lane = _Lane(self, connection)
        try:
            lane.drive()
        except (TransferError, AuthError) as error:
            self.fail(error)
        finally:
            with self.pull.lock:
                self.share.path = connection.path  # some know it only once they have read
            if self._fence(connection):
                lane.give_back()
            self.pull.wake.set()


class _Lane:
    """One connection's loop: claim, read, verify."""

    def __init__(self, peer: _PeerPull, connection: Connection) -> None:
        self.peer = peer
        self.pull = peer.pull
        self.connection = connection
        self.into = self.pull.into[peer.session.transport]
        self.under_way: deque[tuple[Chunk, Read | None]] = deque()
        self.on_device = all(segment.device != "cpu" for segment in self.into.memory.segments)
        self.together = 0  # bytes of chunks that one read asks for

    def drive(self) -> None:
        work = self.pull.work
        while not self.peer.stopping.is_set():
            self._fill()
            if self.under_way:
                self._finish_first()
            elif work.wait(0.1):
                return

    def give_back(self) -> None:
        """Legal once the connection is fenced."""
        while self.under_way:
            self.pull.work.give_back(self.under_way.pop()[0])

    def _fill(self) -> None:
        while len(self.under_way) < self.connection.depth:
            chunk = self.pull.work.claim(self.together)
            if chunk is None:
                return
            self.under_way.append((chunk, None))
            self.under_way[-1] = (chunk, self.connection.read(chunk.span, self.into))

    def _finish_first(self) -> None:
        chunk, read = self.under_way[0]
        assert read is not None
        began = time.monotonic()
        outstanding = min(sum(other.span.nbytes for other, _ in self.under_way), STALL_BYTES)
        stalled = began + self.pull.bounds.stall_s + outstanding / SLOWEST_RATE
        read.wait(min(self.pull.bounds.deadline, stalled))
        arrived = time.monotonic()
        self.pull.verify(self.into.memory, chunk.leaves, self.peer.share.peer)
        self.under_way.popleft()
        self.pull.work.verified(chunk)
        self._adapt(chunk.span.nbytes, time.monotonic() - began)
        with self.pull.lock:
            self.pull.report.wire_s += arrived - began
            self.pull.report.verify_s += time.monotonic() - arrived
            self.peer.share.nbytes += chunk.span.nbytes
        self.pull.arrived(chunk.span.nbytes)
        if self.pull.work.finished:
            self.pull.wake.set()

    def _adapt(self, nbytes: int, seconds: float) -> None:
        """Larger reads while they are quick, on a device; on the host a chunk is verified while it is in cache."""
        if self.on_device and seconds < READ_S:
            self.together = min(max(self.together, 4 * nbytes), MAX_READ_BYTES)
        elif seconds > 4 * READ_S:
            self.together //= 2


class BadLeaf(DigestMismatch):
    """A leaf arrived with a wrong digest; ``leaf`` is its index in the layout."""

    def __init__(self, peer: str, leaf: int) -> None:
        self.leaf = leaf
        super().__init__(f"leaf {leaf} from {peer} does not have its digest", "it is fetched elsewhere")


def _last_error(active: list[_PeerPull]) -> TransferError:
    errors = [peer.share.error for peer in active if peer.share.error is not None]
    if not errors:
        return TransferError("no peer is left to read from", "see the reasons above")
    last = errors[-1]
    return last if isinstance(last, TransferError) else TransferError(last.problem, last.remedy)
