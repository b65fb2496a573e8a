"""The serving side: one listening socket, one thread a client, bytes straight from the registered memory."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass

from weightwire.auth import Secret
from weightwire.errors import ConfigError, GenerationMoved, NotYet, ProtocolError, WeightwireError
from weightwire.manifest.address import Segment
from weightwire.transport import memory
from weightwire.transport.base import ReadGate, Registration
from weightwire.transport.landing import Staging, leaving
from weightwire.transport.ledger import Ledger
from weightwire.transport.pacing import Pacer
from weightwire.transport.tcp import frames
from weightwire.transport.tcp.frames import Request, Status
from weightwire.transport.tcp.greeting import greet_client
from weightwire.transport.tcp.settings import TcpSettings
from weightwire.transport.tcp.stream import OverdueError, Stream

_BACKLOG = 128
NICENESS = 10
"""Of threads that serve readers: a tenth of a core that is wanted for computing, all of one that is not."""
_ACCEPT_PAUSE_S = 0.1

_log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that shares its port with nobody.

    Args:
        host: address or name of a local interface.
        port: 0 lets the system choose.

    Raises:
        ConfigError: no such address here, or the port is taken; names both.
    """
    family = _family(host)
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if port:
            # On Linux this lets a restarted source have its port again at once, past connections in TIME_WAIT; it
            # never lets two listeners share one (that is SO_REUSEPORT).
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot serve tcp on {host}:{port}: {error.strerror}", "give a local address, and a free port or 0"
        ) from error
    except BaseException:
        listening.close()
        raise
    return listening


def _family(host: str) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ConfigError(f"cannot serve tcp on {host}: {error.strerror}", "give an address of this machine") from error


@dataclass(frozen=True, slots=True)
class Service:
    """What all sessions of one server share."""

    secret: Secret
    incarnation: bytes
    gate: ReadGate
    ledger: Ledger
    settings: TcpSettings
    pacer: Pacer


class Session:
    """One client: greeted, then served under its lease until either side ends it."""

    def __init__(self, accepted: socket.socket, peer: str, service: Service) -> None:
        settings = service.settings
        self.peer = peer
        self.stream = Stream(accepted, dead_host_s=settings.dead_host_s, send_s=settings.send_stall_s)
        self._service = service
        self._staging = Staging()
        self._over = threading.Event()
        self._serving: Registration | None = None

    def cut(self) -> None:
        """End it from another thread, also where it waits for its turn; returns at once. Idempotent."""
        self._over.set()
        self.stream.cut()

    def greet(self) -> bytes | None:
        """The client's lease, once it has proved that it holds the secret; None if it did not."""
        service = self._service
        deadline = time.monotonic() + service.settings.greeting_s
        return greet_client(self.stream, service.secret, service.incarnation, deadline)

    def serve(self, lease: bytes) -> None:
        """Answer requests until the client goes, breaks the protocol, or falls silent."""
        while True:
            deadline = time.monotonic() + self._service.settings.idle_s
            request = frames.decode_request(self.stream.receive_exactly(frames.REQUEST_BYTES, deadline))
            self._answer(lease, request)

    def _answer(self, lease: bytes, request: Request) -> None:
        with contextlib.ExitStack() as use:
            opened = self._open(lease, request, use)
            if isinstance(opened, Status):
                self.stream.send(deque([memoryview(frames.encode_answer(opened, request))]))
            else:
                self._send(request, opened)

    def _open(self, lease: bytes, request: Request, use: contextlib.ExitStack) -> list[Segment] | Status:
        # The gate is asked first and the ledger second, so that what is withdrawn in between is refused.
        try:
            registration = self._service.gate.admit(lease, request.span)
            use.enter_context(self._service.ledger.use(registration, self.cut))
            self._serving = registration
            return registration.memory.slices(request.span)
        except GenerationMoved:
            return Status.MOVED
        except NotYet:
            return Status.NOT_YET
        except (ProtocolError, IndexError) as error:
            _log.warning("refused a read by %s: %s", self.peer, error)
            return Status.REFUSED
        except WeightwireError as error:
            _log.warning("cannot serve a read by %s: %s", self.peer, error)
            return Status.GONE

    def _send(self, request: Request, segments: list[Segment]) -> None:
        head = memoryview(frames.encode_answer(Status.OK, request))
        if memory.on_host(segments):
            self._dispatch(deque([head, *memory.views(segments)]))
            return
        self.stream.send(deque([head]))
        for buffers in leaving(segments, self._staging):
            self._dispatch(buffers)

    def _dispatch(self, buffers: deque[memoryview]) -> None:
        """Send all of ``buffers``, piece by piece where there is a rate to keep to.

        Raises:
            OSError: besides the stream's, where the memory was withdrawn while this waited for its turn.
        """
        pacer = self._service.pacer
        while pacer.rate and buffers:
            piece = memory.take(buffers, pacer.piece)
            if not pacer.hold(pacer.reserve(sum(part.nbytes for part in piece)), self._rest):
                raise ConnectionAbortedError("what is read was withdrawn")
            self.stream.send(piece)
        self.stream.send(buffers)

    def _rest(self, seconds: float) -> bool:
        """A withdrawal must not wait for readers that wait for their turn, so it is looked for in between."""
        assert self._serving is not None
        return self._over.wait(seconds) or not self._service.ledger.live(self._serving)


def _give_way() -> None:
    """Let what this process computes go first on a busy core: on Linux each thread has a niceness of its own.

    Added to the process's: one that is nicer itself would serve before it computes, where it may raise a priority.
    """
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)  # 19 is the end


class Server:
    """Accepts clients until closed.

    Args:
        listening: from ``listen``; owned from now on.
        service: what every session needs.
    """

    def __init__(self, listening: socket.socket, service: Service) -> None:
        self._listening = listening
        self._service = service
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._greeting: dict[Session, None] = {}  # in order of arrival
        self._sessions: set[Session] = set()
        self._threads: set[threading.Thread] = set()
        self._acceptor = threading.Thread(target=self._accept, name="weightwire-tcp-accept", daemon=True)
        self._acceptor.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listening.getsockname()[1])

    def close(self) -> None:
        """Refuse new clients, cut all others, wait for our threads (bounded). Idempotent."""
        with self._lock:
            self._closing.set()
            open_sessions = [*self._sessions]
            threads = [*self._threads]
        try:
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone does not
        except OSError:
            _log.debug("tcp server was closed already")
        for session in open_sessions:
            session.cut()
        deadline = time.monotonic() + self._service.settings.close_s
        for thread in [self._acceptor, *threads]:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._listening.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                accepted, address = self._listening.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                _log.warning("cannot accept a tcp client: %s", error.strerror)
                time.sleep(_ACCEPT_PAUSE_S)  # out of file descriptors, most likely
                continue
            self._admit(accepted, f"{address[0]}:{address[1]}")

    def _admit(self, accepted: socket.socket, peer: str) -> None:
        try:
            session = Session(accepted, peer, self._service)
        except OSError:
            accepted.close()  # it has gone already
            return
        with self._lock:
            full = self._closing.is_set() or len(self._sessions) >= self._service.settings.sessions
            if not full:
                self._sessions.add(session)
                self._greeting[session] = None
                self._end_oldest_greeting()
        if full:
            _log.warning("refused tcp client %s: %d are being served", peer, self._service.settings.sessions)
            session.stream.close()
            return
        self._start(session)

    def _end_oldest_greeting(self) -> None:
        # An honest client is done in a round trip: whoever dawdles longest makes room.
        if len(self._greeting) > self._service.settings.greetings:
            oldest = next(iter(self._greeting))
            oldest.stream.cut()
            del self._greeting[oldest]
            self._sessions.discard(oldest)

    def _start(self, session: Session) -> None:
        thread = threading.Thread(target=self._run, args=(session,), name="weightwire-tcp-serve", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _run(self, session: Session) -> None:
        try:
            lease = session.greet()
            self._greeted(session)
            if lease is None:
                _log.warning("refused tcp client %s: it does not hold the secret", session.peer)
            else:
                _give_way()
                session.serve(lease)
        except OverdueError:
            _log.info("let tcp client %s go: silent for too long", session.peer)
        except ProtocolError as error:
            _log.warning("ended tcp client %s: %s", session.peer, error)
        except OSError as error:
            _log.debug("tcp client %s has gone: %s", session.peer, error)
        except Exception:  # noqa: BLE001  # a thread's edge: one client's failure must not be silent, nor end the others
            _log.exception("failed while serving tcp client %s", session.peer)
        finally:
            session.stream.close()
            self._forget(session)

    def _greeted(self, session: Session) -> None:
        with self._lock:
            self._greeting.pop(session, None)

    def _forget(self, session: Session) -> None:
        with self._lock:
            self._greeting.pop(session, None)
            self._sessions.discard(session)
            self._threads.discard(threading.current_thread())
