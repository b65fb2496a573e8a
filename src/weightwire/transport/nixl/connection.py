"""Reading from one peer, through an agent of our own that is never used for anything else."""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from weightwire.errors import FenceTimeout, PeerLost, PeerStalled, ProtocolError, TransferError, WeightwireError
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport.base import Registration
from weightwire.transport.nixl.agent import Agent
from weightwire.transport.nixl.bounded import Bounded
from weightwire.transport.nixl.endpoint import Endpoint
from weightwire.transport.nixl.lanes import Way, tcp_is_asked_for
from weightwire.transport.nixl.pieces import Joined, Piece
from weightwire.transport.nixl.places import Places
from weightwire.transport.nixl.registration import NixlRegistration
from weightwire.types import Span

READ_BYTES = 8 * 1024 * 1024
"""What one read should ask for: enough that asking costs nothing, little enough that digests find it in a cache."""

DEPTH = 4
IN_FLIGHT = 4
"""Transfers that are posted at a time, of whatever reads."""

PROBE_BYTES = 64
FIRST_BYTES = 64 * 1024
"""Of the first transfer of a way: should it turn out to be TCP and be refused, the source is left with little to do."""

TCP_BYTES = 1024 * 1024
"""Of one transfer over TCP, so that what is under way when a reader leaves arrives soon; faster it does not get."""

DRAIN_S = 0.5
"""How long a fence lets arrive what is under way over TCP."""

COPYING: Way = ("cpu", "cpu")
"""Between host memories, which cross-memory attach copies in the thread that asks."""

STEP_BYTES = 4 * 1024 * 1024
"""Where the reading thread itself copies, what it copies before it looks at it: a round of the interpreter for less
costs too much, and more is in no cache any more when it is digested."""

COPYING_STREAMS = min(4, len(os.sched_getaffinity(0)))
"""Connections that pay there: as many cores copy and digest (``docs/performance.md``)."""

COPYING_SHARD = 128 * 1024 * 1024
"""Bytes below which they do not: while another agent is made, one connection copies as much."""

COPYING_TENSOR = 256 * 1024
"""Bytes in one piece, on average, below which they do not: all pieces are registered for each of them."""

_EAGER_S = 0.02
_NAP_S = 0.0001

_log = logging.getLogger(__name__)


class NixlRead:
    """One read; see :class:`~weightwire.transport.base.Read`. ``wait`` drives the transfers."""

    def __init__(
        self,
        connection: NixlConnection,
        pieces: Iterable[Piece],
        before: CopyingRead | None = None,
        *,
        probe: bool = False,
    ) -> None:
        self._connection = connection
        self._before = before
        self.pieces = deque(pieces)
        self.probe = probe
        self.finished = False

    def wait(self, deadline: float) -> None:
        """Finish this read, and all before it."""
        if self._before is not None:
            self._before.wait(deadline)
            self._before = None
        self._connection.drive(self, deadline)


class CopyingRead:
    """One read that the waiting thread copies by itself, in order: nothing of it moves in between."""

    def __init__(
        self, connection: NixlConnection, joined: Joined, span: Span, before: NixlRead | CopyingRead | None
    ) -> None:
        self._connection = connection
        self._joined = joined
        self._span = span
        self._before = before
        self._begun = 0  # bytes of pieces that were made; those that are left were not copied
        self._pieces: deque[Piece] = deque()

    @property
    def finished(self) -> bool:
        """Whether all of it is in place."""
        return self._begun == self._span.nbytes and not self._pieces

    def wait(self, deadline: float) -> None:
        """Copy what is left, and all reads before it."""
        self.wait_for(self._span.nbytes, deadline)

    def wait_for(self, nbytes: int, deadline: float) -> None:
        """Copy what is left of the first ``nbytes`` bytes, and of all reads before this one."""
        if self._before is not None:
            self._before.wait(deadline)
            self._before = None
        if nbytes > self._begun:
            self._pieces.extend(self._joined.pieces(Span(self._span.offset + self._begun, nbytes - self._begun)))
            self._begun = nbytes
        self._connection.copy(self._pieces, deadline)


class NixlConnection:
    """A :class:`~weightwire.transport.base.Connection` with a receive agent of its own.

    Destroying that agent is the fence, because nothing less is: after releasing the transfer, removing the peer and
    deregistering the memory, a source that was frozen still delivers most of what was asked for (seen with NIXL 1.5.1
    over TCP). The agent has no progress thread, so bytes arrive only while a thread of ours is in ``read`` or ``wait``.

    Over TCP it lets arrive first what is under way, for ``DRAIN_S`` at most.

    What is read into stays registered with the agent, and referred to, until the connection is fenced.

    Args:
        agent: fresh, serving nothing; owned from now on.
        peer: the source, checked.
        require_rdma: refuse TCP even if it is asked for, and what cannot be told.
    """

    def __init__(self, agent: Agent, peer: Endpoint, *, require_rdma: bool) -> None:
        self._agent = agent
        self._peer = peer
        self._require_rdma = require_rdma
        self._lock = threading.Lock()
        self._over = ""
        self._registered: dict[int, tuple[Registration, Joined]] = {}
        self._places = Places()
        self._reads: deque[NixlRead] = deque()
        self._posted: deque[tuple[int, NixlRead]] = deque()
        self._last: NixlRead | CopyingRead | None = None
        self._ways: dict[Way, tuple[str, ...]] = {}
        self._probed: tuple[str, ...] = ()
        self._scratch = np.frombuffer(mmap.mmap(-1, PROBE_BYTES), dtype=np.uint8)  # a page of its own: see Places
        self._teardown = Bounded(f"nixl-end-{agent.name}", self._end)

    @property
    def path(self) -> str:
        """``nixl/ucx:cma``, ``nixl/ucx:rc_mlx5`` …: what UCX said that it reads with; ``nixl/ucx:?`` if it did not."""
        used = sorted({transport for transports in self._ways.values() for transport in transports})
        return "nixl/ucx:" + ("+".join(used or self._probed) or "?")

    @property
    def depth(self) -> int:
        """See the contract. A thread that copies by itself does one thing at a time."""
        return 1 if self.copies else DEPTH

    @property
    def copies(self) -> bool:
        """Whether several connections read over cross-memory attach, each thread copying and digesting by itself.

        One alone is better off with digests in a thread beside it, and with small tensors one alone is best.
        """
        memory = self._peer.memory
        large = memory.span.nbytes >= max(COPYING_SHARD, COPYING_TENSOR * len(memory.all.offsets))
        return self._ways.get(COPYING, self._probed) == ("cma",) and large and COPYING_STREAMS > 1

    @property
    def streams(self) -> int:
        """How many connections to this peer pay."""
        return COPYING_STREAMS if self.copies else 1

    @property
    def step_bytes(self) -> int:
        """See ``STEP_BYTES``."""
        return STEP_BYTES

    @property
    def read_bytes(self) -> int:
        """See ``READ_BYTES``."""
        return READ_BYTES

    def open(self, deadline: float) -> None:
        """Make the peer known and read a few bytes of it into memory of our own: it is alive, and this is the way.

        Raises:
            ProtocolError: its metadata is refused.
            PeerLost: it is gone.
            PeerStalled: no answer by ``deadline``.
            TransferError: the way is TCP, which is refused under ``require_rdma`` and where it was not asked for.
        """
        with self._lock:
            self._agent.add_peer(self._peer.metadata, self._peer.agent)
            scratch = Region(self._scratch.ctypes.data, PROBE_BYTES, "cpu")
            self._agent.register(self._places.add([scratch]))
            first = next(iter(self._peer.memory.all.part(0, 1).segments), None)
        if first is None:
            return
        size = min(first.nbytes, PROBE_BYTES)
        near, far = Segment(0, scratch.address, size, "cpu"), Segment(0, first.address, size, first.device)
        probe = NixlRead(self, Joined(_space(near), _space(far)).pieces(Span(0, size)), probe=True)
        self._start(probe)
        probe.wait(deadline)

    def read(self, span: Span, into: Registration) -> NixlRead | CopyingRead:
        """See the contract.

        Raises:
            TransferError: ``into`` cannot be registered, or the way is TCP (see ``open``).
        """
        joined = self._joined(into, span)
        before = self._last if self._last is not None and not self._last.finished else None
        if self.copies and joined.ways == {COPYING}:
            self._last = CopyingRead(self, joined, span, before)
            return self._last
        # those of its own kind it knows by itself
        read = self._last = NixlRead(self, joined.pieces(span), before if isinstance(before, CopyingRead) else None)
        self._start(read)
        return read

    def copy(self, pieces: deque[Piece], deadline: float) -> None:
        """Move ``pieces`` now, one after the other, and empty it; what ``CopyingRead.wait`` does."""
        while pieces:
            with self._lock:
                self._check_open()
                self._copy_next(pieces, deadline)

    def drive(self, read: NixlRead, deadline: float) -> None:
        """Move bytes until ``read`` is finished; what ``NixlRead.wait`` does."""
        began = time.monotonic()
        while True:
            with self._lock:
                self._check_open()
                self._advance()
                if read.finished:
                    return
            now = time.monotonic()
            if now >= deadline:
                raise PeerStalled("a nixl read was not done in time", "fence it and read from another peer")
            time.sleep(0 if now - began < _EAGER_S else _NAP_S)

    def uses(self, registration: Registration) -> bool:
        """Whether ``registration`` is still registered with the agent."""
        return self._registered.get(id(registration), (None,))[0] is registration

    def fence(self, deadline: float) -> None:
        """See the contract: destroys the receive agent, in a thread of its own."""
        self._over = self._over or "it was fenced"
        self._teardown.run(
            deadline,
            FenceTimeout(
                "a nixl receive agent could not be ended in time", "keep the memory of its reads, do not refill it"
            ),
        )

    def _joined(self, into: Registration, span: Span) -> Joined:
        into.memory.check(span)
        try:
            self._peer.memory.check(span)
        except IndexError as error:
            raise ProtocolError(
                "the span is outside what the source holds", "ask for what the manifest says"
            ) from error
        with self._lock:
            self._check_open()
            if id(into) not in self._registered:  # by object: it stays alive here, so its id stays its own
                self._agent.register(self._places.add(_regions(into)))
                self._registered[id(into)] = into, Joined(into.memory, self._peer.memory)
            return self._registered[id(into)][1]

    def _start(self, read: NixlRead) -> None:
        with self._lock:
            self._check_open()
            self._reads.append(read)
            self._advance(most=1)

    def _advance(self, most: int = IN_FLIGHT) -> None:
        """Take note of what has finished, and post what has room."""
        try:
            self._collect()
            for _ in range(most):
                if len(self._posted) >= IN_FLIGHT or not self._post_next():
                    break
            self._collect()
        except WeightwireError as error:
            self._over = self._over or error.problem
            raise

    def _collect(self) -> None:
        while self._posted and self._agent.done(self._posted[0][0]):
            self._agent.release(self._posted.popleft()[0])
        waiting_for = self._posted[0][1] if self._posted else None
        for read in itertools.takewhile(lambda each: each is not waiting_for, list(self._reads)):
            if read.pieces:
                break
            read.finished = True
            self._reads.popleft()

    def _post_next(self) -> bool:
        for read in self._reads:
            if read.pieces:
                self._posted.append((self._post(read.pieces, probe=read.probe), read))
                return True
        return False

    def _copy_next(self, pieces: deque[Piece], deadline: float) -> None:
        late = PeerStalled("a nixl read was not done in time", "fence it and read from another peer")
        if time.monotonic() >= deadline:
            raise late
        try:
            handle = self._post(pieces)
            while not self._agent.done(handle):
                if time.monotonic() >= deadline:
                    raise late
                time.sleep(_NAP_S)
            self._agent.release(handle)
        except WeightwireError as error:  # a piece may be under way: nothing is read behind it
            self._over = self._over or error.problem
            raise

    def _post(self, pieces: deque[Piece], *, probe: bool = False) -> int:
        """Post the first of ``pieces``, or the first part of it."""
        piece = pieces.popleft()
        way = (piece.local.partition(":")[0], piece.remote.partition(":")[0])
        piece, rest = piece.split(self._most(way, piece))
        if rest is not None:
            pieces.appendleft(rest)
        handle = self._agent.post(piece, self._peer.agent)
        self._look_at_way(way, probe=probe)
        return handle

    def _most(self, way: Way, piece: Piece) -> int:
        if way not in self._ways:
            return FIRST_BYTES
        return TCP_BYTES if "tcp" in self._ways[way] else piece.nbytes

    def _look_at_way(self, way: Way, *, probe: bool) -> None:
        """UCX chooses with the first transfer between two kinds of memory: ask it then."""
        if way in self._ways:
            return
        found = self._agent.transports().get(way, ())
        if probe:
            self._probed = found if way[1] == "cpu" else ()
        else:
            self._ways[way] = found
            _log.info("reading into %s memory from %s memory of %s over %s", *way, self._peer.agent, self.path)
        if probe and way[1] != "cpu":
            return  # a device is read into a device: that goes another way than this did
        if self._require_rdma and (not found or "tcp" in found):
            raise TransferError(
                f"reads would go over {self.path}, and RDMA is required", "repair RDMA or unset require_rdma"
            )
        if "tcp" in found and not tcp_is_asked_for():
            raise TransferError(f"reads would go over {self.path}", "read over the tcp transport, or set UCX_TLS=tcp")

    def _check_open(self) -> None:
        if self._over:
            raise PeerLost(f"the nixl connection is over: {self._over}", "read from another peer")

    def _end(self) -> None:
        with self._lock:
            self._over = self._over or "it was fenced"
            if any("tcp" in lanes for lanes in (self._probed, *self._ways.values())):
                self._drain()
            self._agent.destroy()
            self._reads.clear()
            self._posted.clear()
            self._last = None
            self._registered.clear()

    def _drain(self) -> None:
        """UCX may abort a source in the middle of an answer if its reader leaves: see ``lanes.tcp_is_asked_for``."""
        until = time.monotonic() + DRAIN_S
        with contextlib.suppress(TransferError):
            while self._posted and time.monotonic() < until:
                if self._agent.done(self._posted[0][0]):
                    self._agent.release(self._posted.popleft()[0])
                else:
                    time.sleep(0)


def _regions(into: Registration) -> Sequence[Region]:
    return into.regions if isinstance(into, NixlRegistration) else into.memory.regions


def _space(segment: Segment) -> AddressSpace:
    return AddressSpace([segment], (), None)
