"""Who may read this process's published bytes, and until when: read leases on one generation.

Every transport asks here before it serves. Withdrawing shuts the table first; then the transports drain; only then may
bytes change.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from weightwire.errors import GenerationMoved, ProtocolError
from weightwire.transport.base import Registration
from weightwire.types import Span

LEASE_BYTES = 16
MAX_LEASES = 1024
"""Readers at a time; more than this is somebody misbehaving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLease:
    """A reader's right to read one generation.

    Attributes:
        token: unguessable, ``LEASE_BYTES``.
        reader: what the reader calls itself, for logs.
        transports: names of the transports that it may be used on.
        generation: the generation that it reads.
        expires: ``time.monotonic()`` value; a reader renews it by asking for progress or opening again.
    """

    token: bytes
    reader: str
    transports: tuple[str, ...]
    generation: int
    expires: float


class LeaseTable:
    """Read leases of one publication. Thread-safe.

    Args:
        ttl_s: seconds that a lease lives without being used.
        clock: monotonic seconds.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[bytes, ReadLease] = {}
        self._registrations: Mapping[str, Registration] = {}

    def open(self, registrations: Mapping[str, Registration]) -> None:
        """Let readers in; ``registrations`` by name of the transport."""
        with self._lock:
            self._registrations = dict(registrations)

    def shut(self) -> None:
        """Let nobody in and end every lease; returns at once. A read that a transport has already admitted goes on until
        the transport drains.
        """
        with self._lock:
            self._leases.clear()
            self._registrations = {}

    def grant(self, reader: str, transports: Sequence[str], generation: int) -> ReadLease:
        """A new lease for those of ``transports`` that are served here, in their order.

        Raises:
            GenerationMoved: nothing is published at the moment.
            ProtocolError: none of the transports is served here, or there are too many readers.
        """
        with self._lock:
            self._sweep()
            if not self._registrations:
                raise GenerationMoved("the source is not serving at the moment", "ask the metadata server for another")
            common = tuple(name for name in transports if name in self._registrations)
            if not common:
                served = ", ".join(self._registrations)
                raise ProtocolError(f"no transport in common: the source serves {served}", "allow one of them")
            if len(self._leases) >= MAX_LEASES:
                raise ProtocolError("the source has too many readers", "use another source")
            token = secrets.token_bytes(LEASE_BYTES)
            expires = self._clock() + self.ttl_s
            lease = ReadLease(token=token, reader=reader, transports=common, generation=generation, expires=expires)
            self._leases[token] = lease
            return lease

    def admit(self, lease: bytes, span: Span, transport: str) -> Registration:
        """What ``transport`` may serve ``span`` from under ``lease``. Using a lease renews it.

        Raises:
            GenerationMoved: the lease is over.
            ProtocolError: not for this transport, or outside the shard.
        """
        with self._lock:
            found = self._leases.get(lease)
            if found is None:
                raise GenerationMoved("the read lease is over", "open a new one; the source may have withdrawn")
            if transport not in found.transports:
                raise ProtocolError(f"the read lease is not for {transport}", "open one for it")
            registration = self._registrations[transport]
            covered = registration.memory.span
            if span.nbytes < 0 or span.offset < covered.offset or span.end > covered.end:
                raise ProtocolError(
                    f"bytes {span.offset}..{span.end} are outside the shard", "read inside the manifest"
                )
            self._leases[lease] = replace(found, expires=self._clock() + self.ttl_s)
            return registration

    def renew(self, lease: bytes) -> bool:
        """Keep a lease alive without reading through the gate; false if it is over."""
        with self._lock:
            found = self._leases.get(lease)
            if found is None:
                return False
            self._leases[lease] = replace(found, expires=self._clock() + self.ttl_s)
            return True

    def close(self, lease: bytes) -> ReadLease | None:
        """End one lease; ``None`` if it was over already."""
        with self._lock:
            return self._leases.pop(lease, None)

    @property
    def active(self) -> int:
        """Leases that are alive."""
        with self._lock:
            self._sweep()
            return len(self._leases)

    def wait_idle(self, deadline: float, poll_s: float = 0.02) -> bool:
        """Wait until no lease is alive; false at ``deadline`` (``time.monotonic()``)."""
        while self.active:
            if time.monotonic() >= deadline:
                return False
            time.sleep(poll_s)
        return True

    def _sweep(self) -> None:
        now = self._clock()
        for token in _expired(self._leases.values(), now):
            del self._leases[token]


def _expired(leases: Iterable[ReadLease], now: float) -> list[bytes]:
    return [lease.token for lease in leases if lease.expires <= now]
