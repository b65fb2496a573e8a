"""The reading side: one socket, one lease, a pipeline of reads that land directly in their target memory."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from weightwire.errors import FenceTimeout, GenerationMoved, NotYet, PeerLost, PeerStalled, ProtocolError, TransferError
from weightwire.manifest.address import Segment
from weightwire.manifest.host_digest import ArrivingDigests
from weightwire.transport.base import Registration
from weightwire.transport.landing import Landing, Staging
from weightwire.transport.tcp import frames
from weightwire.transport.tcp.settings import READ_BYTES
from weightwire.transport.tcp.stream import BUFFERS, OverdueError, Stream
from weightwire.types import Span

DEPTH = 2
"""Reads worth having under way: the source sends the second while we are told of the first."""

WINDOW = 16
"""Most requests that are sent and not answered; further ones wait here, so that sending never blocks."""

_log = logging.getLogger(__name__)


class TcpRead:
    """One read; see :class:`~weightwire.transport.base.Read`."""

    def __init__(self, connection: TcpConnection, into: Registration, nbytes: int, parts: int) -> None:
        self.into = into  # keeps the memory alive while bytes may still land in it
        self._connection = connection
        self._nbytes = nbytes
        self._landed = 0
        self._parts = parts
        self._status = frames.Status.OK

    @property
    def finished(self) -> bool:
        """Whether nothing of it is outstanding, well or badly ended."""
        return self._parts == 0

    def wait(self, deadline: float) -> None:
        """Receive until this read (and all before it) is in place; raises as the contract says."""
        self.wait_for(self._nbytes, deadline)

    def wait_for(self, nbytes: int, deadline: float) -> None:
        """The same for its first ``nbytes`` bytes."""
        self._connection.receive_until(self, nbytes, deadline)
        self._settle(deadline)

    def wait_digested(self, arriving: ArrivingDigests, deadline: float) -> None:
        """As ``wait``, for a read of just the leaves of ``arriving``, which are hashed on their way."""
        arriving.in_place(self._landed)
        if self._parts == 1:
            self._connection.receive_digested(self, arriving, deadline)
            self._settle(deadline)
        else:  # a part may end in the middle of a block
            self.wait(deadline)
            arriving.in_place(self._landed)
            arriving.receive(-1, 0.0)  # nothing is asked of a socket

    def _settle(self, deadline: float) -> None:
        if self._status is frames.Status.NOT_YET:  # the connection goes on, so nothing of it may land later
            self._connection.receive_until(self, self._nbytes, deadline)
        if self._status is not frames.Status.OK:
            raise _refusal(self._status, self._connection.peer)

    def lacks(self, nbytes: int) -> int:
        """How many of its first ``nbytes`` bytes are not in place; 0 also where no more will come.

        All of it is in place only once nothing of it is outstanding, so then at least 1.
        """
        if self.finished:
            return 0
        return max(nbytes - self._landed, 1 if nbytes >= self._nbytes else 0)

    def grown(self, nbytes: int) -> None:
        """So many more are in place; for the connection only."""
        self._landed += nbytes

    def part_ended(self, status: frames.Status) -> None:
        """One request of it was answered; for the connection only."""
        self._parts -= 1
        if self._status is frames.Status.OK:
            self._status = status


@dataclass(eq=False, slots=True)
class _Part:
    """One request on the wire: at most ``MAX_READ_BYTES`` of a read."""

    read: TcpRead
    request: frames.Request
    segments: list[Segment]
    landing: Landing | None = field(default=None)


class TcpConnection:
    """A :class:`~weightwire.transport.base.Connection` over one greeted stream.

    Args:
        stream: past its greeting; owned from now on.
        peer: ``host:port``, for messages.
        fenced: told once, when the fence has succeeded.
        read_bytes: see ``READ_BYTES``.
    """

    def __init__(
        self, stream: Stream, peer: str, fenced: Callable[[TcpConnection], None], read_bytes: int = READ_BYTES
    ) -> None:
        self.peer = peer
        self.read_bytes = read_bytes
        self._tell = fenced
        self._stream = stream
        self._staging = Staging()
        self._state = threading.Condition()
        self._busy = False  # a thread is inside the stream, perhaps writing to target memory
        self._ended = ""  # why nothing more can be read, once it is so
        self._closed = False
        self._sequence = 0
        self._unsent: deque[_Part] = deque()
        self._sent: deque[_Part] = deque()
        self._head = memoryview(bytearray(frames.ANSWER_BYTES))
        self._head_filled = 0

    @property
    def path(self) -> str:
        """Always ``tcp``."""
        return "tcp"

    @property
    def depth(self) -> int:
        """See ``DEPTH``."""
        return DEPTH

    def read(self, span: Span, into: Registration) -> TcpRead:
        """Ask for ``span`` at once; longer ones than ``MAX_READ_BYTES`` travel as several requests."""
        pieces = [(piece, into.memory.slices(piece)) for piece in _cut(span)]  # IndexError before anything is sent
        read = TcpRead(self, into, span.nbytes, len(pieces))
        with self._turn():
            for piece, segments in pieces:
                request = frames.Request(self._sequence, piece)
                self._sequence = (self._sequence + 1) % frames.SEQUENCES
                self._unsent.append(_Part(read, request, segments))
            self._send_requests()
        return read

    def receive_until(self, read: TcpRead, nbytes: int, deadline: float) -> None:
        """Receive in order until ``read`` has ended, or its first ``nbytes`` are in place; what ``TcpRead.wait`` does.

        Raises:
            PeerStalled: not by ``deadline``; everything stays outstanding and can be waited for again.
            PeerLost: the connection is broken or fenced.
            ProtocolError: the peer broke the protocol; the connection is ended.
        """
        if not read.lacks(nbytes):
            return
        with self._turn():
            while lacking := read.lacks(nbytes):
                first = self._sent[0]
                self._receive_some(first, lacking if first.read is read else frames.MAX_READ_BYTES, deadline)

    def receive_digested(self, read: TcpRead, arriving: ArrivingDigests, deadline: float) -> None:
        """Receive in order until ``read``, of one request, has ended; its bytes are hashed on their way.

        Raises as ``receive_until``.
        """
        with self._turn():
            while (first := self._sent[0]).read is not read:
                self._receive_some(first, frames.MAX_READ_BYTES, deadline)
            landing, status = self._begun(first, deadline)
            if not landing.direct:
                self._receive_some(first, frames.MAX_READ_BYTES, deadline)
                return
            while not landing.complete:
                nbytes = self._received(lambda: self._stream.receive_digested(arriving, deadline))
                landing.advance(nbytes)
                read.grown(nbytes)
            self._finish(first, status)

    def fence(self, deadline: float) -> None:
        """End the connection; once it returns no thread of ours writes what this peer sent, nor ever will."""
        with self._state:
            if self._closed:
                return
            self._ended = self._ended or "it was fenced"
            self._stream.cut()
            if not self._state.wait_for(lambda: not self._busy, max(0.0, deadline - time.monotonic())):
                raise FenceTimeout(
                    f"reads from {self.peer} did not stop in time",
                    "keep the memory of those reads and do not refill it",
                )
            self._stream.close()
            self._closed = True
            self._unsent.clear()
            self._sent.clear()
        self._tell(self)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside this block, and only there, a thread uses the stream and writes to target memory."""
        with self._state:
            self._check()
            if self._busy:
                raise RuntimeError("a connection is driven by one thread")
            self._busy = True
        try:
            yield
        finally:
            with self._state:
                self._busy = False
                self._state.notify_all()

    def _check(self) -> None:
        if self._ended:
            raise PeerLost(f"the connection to {self.peer} is over: {self._ended}", "read from another peer")

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        self._stream.cut()

    def _send_requests(self) -> None:
        while self._unsent and len(self._sent) < WINDOW:
            part = self._unsent.popleft()
            self._sent.append(part)
            try:
                self._stream.send(deque([memoryview(frames.encode_request(part.request))]))
            except (OverdueError, OSError) as error:
                self._end(_reason(error))
                self._check()

    def _receive_some(self, part: _Part, most: int, deadline: float) -> None:
        """Receive the first ``most`` bytes that ``part`` lacks; all of them where it does not land on the host."""
        landing, status = self._begun(part, deadline)
        most = most if landing.direct else frames.MAX_READ_BYTES
        try:
            while most > 0 and (buffers := landing.buffers(BUFFERS, most)):
                nbytes = self._receive(buffers, deadline)
                landing.advance(nbytes)
                part.read.grown(nbytes)
                most -= nbytes
        except BaseException:
            landing.settle()  # nothing is written once this connection is left alone
            raise
        if landing.complete:
            self._finish(part, status)

    def _begun(self, part: _Part, deadline: float) -> tuple[Landing, frames.Status]:
        """Where the bytes of ``part`` go, once its answer has begun."""
        status = frames.Status.OK
        if part.landing is None:
            status = self._receive_head(part.request, deadline)
            part.landing = Landing(part.segments if status is frames.Status.OK else [], self._staging)
        return part.landing, status

    def _finish(self, part: _Part, status: frames.Status) -> None:
        self._sent.popleft()
        part.read.part_ended(status)
        self._send_requests()

    def _receive_head(self, request: frames.Request, deadline: float) -> frames.Status:
        while self._head_filled < frames.ANSWER_BYTES:
            self._head_filled += self._receive([self._head[self._head_filled :]], deadline)
        self._head_filled = 0
        try:
            return frames.decode_answer(bytes(self._head), request)
        except ProtocolError:
            self._end("it broke the protocol")
            raise

    def _receive(self, buffers: list[memoryview], deadline: float) -> int:
        return self._received(lambda: self._stream.receive(buffers, deadline))

    def _received(self, receive: Callable[[], int]) -> int:
        self._check()  # bytes that had arrived before a fence can still be received after it
        try:
            return receive()
        except OverdueError:
            raise PeerStalled(f"{self.peer} did not send in time", "fence it and read from another peer") from None
        except OSError as error:
            self._end(_reason(error))
            self._check()
            raise  # not reached: ended


def _cut(span: Span) -> Iterator[Span]:
    if span.nbytes == 0:
        yield span
    for offset in range(span.offset, span.end, frames.MAX_READ_BYTES):
        yield Span(offset, min(frames.MAX_READ_BYTES, span.end - offset))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _refusal(status: frames.Status, peer: str) -> TransferError:
    if status is frames.Status.MOVED:
        return GenerationMoved(f"{peer} withdrew what the lease is for", "open a new read, or read from another peer")
    if status is frames.Status.NOT_YET:
        return NotYet(f"{peer} does not have these bytes yet", "ask again when it says that it has them")
    if status is frames.Status.REFUSED:
        return ProtocolError(f"{peer} refused the read", "the lease must be live and the span inside what it covers")
    return PeerLost(f"{peer} cannot serve any more", "read from another peer")
