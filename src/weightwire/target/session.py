"""One peer under a read lease: what the pull reads from, and how its end is noticed early."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence

from weightwire.errors import AuthError, GenerationMoved, PeerLost, TransferError, WeightwireError
from weightwire.observability.metrics import process_metrics
from weightwire.target.reader import Reader
from weightwire.transport.base import Connection
from weightwire.wire.messages import Candidate, FailureKind, OpenRead, PeerFailure, ReadGrant
from weightwire.wire.peer_client import PeerClient

log = logging.getLogger(__name__)


class PeerSession:
    """A read lease on one candidate's shard, and connections under it. See ``target.pull.Session``.

    Args:
        reader: our means.
        candidate: what ``Find`` offered.
        content_id: what we expect it to hold.

    Raises:
        TransferError: it cannot be reached, moved on, or has no transport in common with us.
        AuthError: it does not hold our secret.
    """

    def __init__(self, reader: Reader, candidate: Candidate, content_id: str) -> None:
        self.record = candidate.record
        self.reader = reader
        self.label = peer_label(candidate)
        self.client = contact(reader, candidate)
        try:
            self.grant = self._open(content_id)
        except (WeightwireError, OSError):
            self.client.close()
            raise
        self._usable = [name for name in reader.transports if name in self.grant.endpoints]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.transport = self._usable[0]
        self.warnings: list[str] = []

    @property
    def lanes(self) -> int:
        """How many connections pay."""
        return self.reader.transports[self.transport].streams

    def connect(self, deadline: float) -> Connection:
        """One more connection over the best transport that works; a slower one is named in ``warnings``."""
        with self._lock:
            while True:
                transport = self.reader.transports[self.transport]
                try:
                    return transport.connect(self.grant.endpoints[self.transport], self.grant.lease, deadline)
                except TransferError as error:
                    if isinstance(error, GenerationMoved) or len(self._usable) < 2:
                        raise
                    slower = self._usable[1]
                    self.warnings.append(f"{self.label}: {self.transport} failed ({error.problem}), using {slower}")
                    log.warning("%s", self.warnings[-1])
                    process_metrics().slow_path(self.transport, slower)
                    self._usable.pop(0)
                    self.transport = slower

    def watch(self, failed: Callable[[TransferError], None]) -> None:
        """Follow the source's progress stream in a thread: it keeps the lease alive and tells when it is over."""
        threading.Thread(target=self._follow, args=(failed,), name="weightwire-watch", daemon=True).start()

    def close(self) -> None:
        """Give the lease back; quick, idempotent, silent where the source is gone."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(WeightwireError):
            self.client.close_read(self.grant.lease, timeout=1.0)
        self.client.close()

    def moved(self) -> bool:
        """Whether the source itself says that what we were reading is no longer what it offers."""
        try:
            return self.client.status(self.record.shard_key, timeout=2.0).generation != self.grant.generation
        except GenerationMoved:
            return True
        except WeightwireError:
            return False

    def blame(self, error: WeightwireError, leaf: int) -> None:
        """Tell the metadata server how this source failed us; best effort."""
        kind = FailureKind.MISMATCH if leaf >= 0 else FailureKind.LOST if isinstance(error, PeerLost) else None
        failure = PeerFailure(
            shard_key=self.record.shard_key,
            incarnation=self.record.incarnation,
            generation=self.grant.generation,
            kind=kind or FailureKind.STALLED,
            leaf=leaf,
            reporter=self.reader.incarnation,
            reporter_host=self.reader.host,
            detail=error.problem[:200],
        )
        try:
            self.reader.metadata.report(failure, timeout=2.0)
        except WeightwireError as unheard:
            log.info("the report about %s was not taken: %s", self.label, unheard)

    def _open(self, content_id: str) -> ReadGrant:
        request = OpenRead(
            shard_key=self.record.shard_key,
            incarnation=self.record.incarnation,
            content_id=content_id,
            reader=self.reader.incarnation,
            reader_host=self.reader.host,
            transports=tuple(self.reader.transports),
        )
        grant = self.client.open_read(request, timeout=self.reader.stall_s)
        if not set(grant.endpoints) & set(self.reader.transports):
            raise TransferError(f"{self.label} offers no transport that works here", "see: weightwire doctor")
        return grant

    def _follow(self, failed: Callable[[TransferError], None]) -> None:
        try:
            for update in self.client.progress(self.grant.lease, stall_s=self.reader.stall_s):
                if self._closed.is_set():
                    return
                if update.generation != self.grant.generation:
                    raise GenerationMoved(f"{self.label} withdrew what we were reading", "it is read elsewhere")
        except TransferError as error:
            if not self._closed.is_set():
                failed(error)
        except (WeightwireError, ValueError) as error:  # ValueError: the channel was closed under us
            log.debug("watching %s ended: %s", self.label, error)


def contact(reader: Reader, candidate: Candidate) -> PeerClient:
    """A client of the first of the candidate's endpoints that answers for the incarnation that is meant.

    Raises:
        PeerLost: none does; the last reason.
        AuthError: it answers, but does not hold our secret.
    """
    record, error = candidate.record, PeerLost(f"{peer_label(candidate)} has no endpoint", "ask again")
    until = time.monotonic() + reader.stall_s
    for endpoint in record.endpoints:
        client = PeerClient(endpoint, record.incarnation, reader.secret, timeout=reader.stall_s)
        try:
            client.status(record.shard_key, timeout=max(0.5, until - time.monotonic()))
        except (TransferError, AuthError) as reason:
            client.close()
            if isinstance(reason, AuthError):
                raise
            error = PeerLost(f"{peer_label(candidate)}: {reason.problem}", reason.remedy)
        else:
            return client
    raise error


def peer_label(candidate: Candidate) -> str:
    """How logs and reports name a peer."""
    return peer_name(candidate.record.endpoints, candidate.record.incarnation)


def peer_name(endpoints: Sequence[str], incarnation: str) -> str:
    """Where a peer is, and which process life."""
    return f"{endpoints[0] if endpoints else '?'} ({incarnation[:8]})"
