"""Read leases of one publication: tokens that transports present with every request that they can see.

Which leases may exist, and when they end, is decided by the life cycle (``metadata.lifecycle``); this table holds the
tokens, says what may be read under one, and remembers when each was last used.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from weightwire.errors import GenerationMoved, NotYet, ProtocolError
from weightwire.transport.base import Registration
from weightwire.types import Span

LEASE_BYTES = 16
MAX_LEASES = 1024
"""Readers at a time; more than this is somebody misbehaving."""


Readable = Callable[[Span], bool]


def _everything(_span: Span) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLease:
    """A reader's right to read one generation.

    Attributes:
        token: unguessable, ``LEASE_BYTES``.
        reader: incarnation of the reader, for logs.
        transports: names of the transports that it may be used on.
        told: its reader has no manifest with digests: it is told them as leaves become final.
        seen: the transport that last asked for bytes under it; empty until one did (one-sided ones never do).
    """

    token: bytes
    reader: str
    transports: tuple[str, ...]
    told: bool = False
    seen: str = ""


class LeaseTable:
    """Thread-safe.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[bytes, ReadLease] = {}
        self._used: dict[bytes, float] = {}
        self._registrations: Mapping[str, Registration] = {}
        self._readable: Readable = _everything

    def serve(self, registrations: Mapping[str, Registration], readable: Readable | None = None) -> None:
        """What readers are let at from now on, by name of the transport; empty for nothing.

        Args:
            registrations: of the shard.
            readable: whether a span inside it is there already; left out where all of it is. Asked at every read.
        """
        with self._lock:
            self._registrations = dict(registrations)
            self._readable = readable or _everything

    def grant(self, reader: str, transports: Sequence[str], *, told: bool = False) -> ReadLease:
        """A new lease for those of ``transports`` that are served here; ``told`` as in :class:`ReadLease`.

        Raises:
            GenerationMoved: nothing is served at the moment.
            ProtocolError: none of the transports is served, or there are too many readers.
        """
        with self._lock:
            if not self._registrations:
                raise GenerationMoved("the source is not serving at the moment", "ask for another source")
            common = tuple(name for name in self._registrations if name in transports)
            if not common:
                served = ", ".join(self._registrations)
                raise ProtocolError(f"no transport in common: the source serves {served}", "allow one of them")
            if len(self._leases) >= MAX_LEASES:
                raise ProtocolError("the source has too many readers", "use another source")
            token = secrets.token_bytes(LEASE_BYTES)
            lease = ReadLease(token=token, reader=reader, transports=common, told=told)
            self._leases[lease.token] = lease
            self._used[lease.token] = self._clock()
            return lease

    def admit(self, token: bytes, span: Span, transport: str) -> Registration:
        """What ``transport`` may serve ``span`` from; using a lease keeps it alive.

        Raises:
            GenerationMoved: the lease is over.
            NotYet: ``span`` is not there yet.
            ProtocolError: it is not for this transport, or ``span`` is outside the shard.
        """
        with self._lock:
            lease = self._leases.get(token)
            registration = self._registrations.get(transport)
            if lease is None or registration is None:
                raise GenerationMoved("the read lease is over", "open a new one; the source may have withdrawn")
            if transport not in lease.transports:
                raise ProtocolError(f"the read lease is not for {transport}", "open one for it")
            covered = registration.memory.span
            if span.nbytes < 0 or span.offset < covered.offset or span.end > covered.end:
                raise ProtocolError(f"bytes {span.offset}..{span.end} are outside the shard", "read what it holds")
            if not self._readable(span):
                raise NotYet("this relay does not have these bytes yet", "ask when it says that it has them")
            self._used[token] = self._clock()
            return registration

    def sees(self, token: bytes, transport: str) -> bool:
        """Note that ``transport`` is asked for bytes under ``token``; whether that is news."""
        with self._lock:
            lease = self._leases.get(token)
            if lease is None or lease.seen == transport:
                return False
            self._leases[token] = replace(lease, seen=transport)
            return True

    def told(self, token: bytes) -> bool:
        """See :class:`ReadLease`; false for a lease that is over."""
        with self._lock:
            lease = self._leases.get(token)
            return lease is not None and lease.told

    def open(self) -> list[ReadLease]:
        """All live leases."""
        with self._lock:
            return list(self._leases.values())

    def renew(self, token: bytes) -> bool:
        """Keep a lease alive without reading; false if it is over."""
        with self._lock:
            if token in self._leases:
                self._used[token] = self._clock()
            return token in self._leases

    def drop(self, tokens: Iterable[bytes]) -> None:
        """End leases; idempotent."""
        with self._lock:
            for token in tokens:
                self._leases.pop(token, None)
                self._used.pop(token, None)

    def used(self) -> dict[bytes, float]:
        """When each live lease was last used, on the table's clock."""
        with self._lock:
            return dict(self._used)

    def __contains__(self, token: bytes) -> bool:
        with self._lock:
            return token in self._leases

    def __len__(self) -> int:
        with self._lock:
            return len(self._leases)
