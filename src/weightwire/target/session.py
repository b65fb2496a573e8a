"""One peer under a read lease: what the pull reads from, and how its end is noticed early."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from weightwire.errors import AuthError, GenerationMoved, PeerLost, ProtocolError, TransferError, WeightwireError
from weightwire.manifest.leafset import mask_of
from weightwire.manifest.provisional import Expected, Provisional
from weightwire.manifest.records import DIGEST_BYTES, Manifest
from weightwire.observability.metrics import RECEIVED, process_metrics
from weightwire.target.pacing import PacedConnection
from weightwire.target.reader import Reader
from weightwire.target.shares import EVERYTHING, Share
from weightwire.transport.base import Connection, source_paces
from weightwire.transport.pacing import Pacer
from weightwire.wire.messages import (
    Candidate,
    LeafRange,
    OpenRead,
    PeerStatus,
    ProgressUpdate,
    PublicationState,
    ReadGrant,
)
from weightwire.wire.peer_client import PeerClient
from weightwire.wire.reports import FailureKind, PeerFailure

log = logging.getLogger(__name__)


class PeerSession:
    """A read lease on one candidate's shard, and connections under it. See ``target.pull.Session``.

    Args:
        reader: our means.
        candidate: what ``Find`` offered.
        manifest: what we expect it to hold. Derived leaves may be its own, and are not taken from it then; those of
            a provisional manifest are the same at all who follow one replica.

    Attributes:
        relaying: it is still filling, from a peer.
        growing: it has nothing but what is told through ``watch``: it is still filling, or the manifest is provisional.
        share: the leaves for which it is the one to ask.
        limit: the leaves that it may ever be asked for, as bits.
        paced_s: seconds that our own reads were held back to keep to the source's cap, summed over connections.

    Raises:
        SourceBusy: it serves as many readers as it takes.
        TransferError: it cannot be reached, moved on, or has no transport in common with us.
        AuthError: it does not hold our secret.
    """

    def __init__(self, reader: Reader, candidate: Candidate, manifest: Expected) -> None:
        self.candidate = candidate
        self.record = candidate.record
        self.reader = reader
        self.label = peer_label(candidate)
        self.client, status = meet(reader, candidate)
        filling = status.state is PublicationState.RELAYING
        self._provisional = manifest if isinstance(manifest, Provisional) else None
        self.relaying = filling and not self.record.reads_disk
        self.growing = filling or self._provisional is not None
        self.share = Share(candidate.part, candidate.parts) if candidate.seated else EVERYTHING
        self.limit = _limit(manifest, status)
        self._leaves = len(manifest.layout.leaves)
        try:
            self.grant = self._open(manifest, status.generation)
        except (WeightwireError, OSError):
            self.client.close()
            raise
        self._usable = [name for name in reader.transports if name in self.grant.endpoints]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.transport = self._usable[0]
        self.warnings: list[str] = []
        self._note_transport()
        self.paced_s = 0.0
        self._pacing = threading.Lock()
        self._pacer = Pacer(self.grant.rate, waited=self._paced)
        if self.grant.rate:
            self.warnings.append(
                f"{self.label} caps its bandwidth: it grants this reader {self.grant.rate / 1e6:.1f} MB/s"
            )
            log.info("%s", self.warnings[-1])

    @property
    def rate(self) -> float:
        """Bytes a second that the source grants us now, all connections together; 0 for no bound."""
        return self._pacer.rate

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
                    made = transport.connect(self.grant.endpoints[self.transport], self.grant.lease, deadline)
                    return PacedConnection(made, self._pacer) if self.rate and not source_paces(transport) else made
                except TransferError as error:
                    if isinstance(error, GenerationMoved) or len(self._usable) < 2:
                        raise
                    slower = self._usable[1]
                    self.warnings.append(f"{self.label}: {self.transport} failed ({error.problem}), using {slower}")
                    log.warning("%s", self.warnings[-1])
                    process_metrics().slow_path(self.transport, slower)
                    self._usable.pop(0)
                    self.transport = slower

    def watch(self, failed: Callable[[TransferError], None], offers: Callable[[int], None] = lambda _: None) -> None:
        """Follow the source's progress stream in a thread: it keeps the lease alive and tells when it is over.

        Args:
            failed: called with the reason when the source is of no more use.
            offers: called with leaves (bits) that the source has from now on.
        """
        threading.Thread(target=self._follow, args=(failed, offers), name="weightwire-watch", daemon=True).start()

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
        asking = self.client
        if self._closed.is_set():  # the pull was through with it before anybody asked
            asking = PeerClient(asking.target, self.record.incarnation, self.reader.secret)
        try:
            return asking.status(self.record.shard_key, timeout=2.0).generation != self.grant.generation
        except GenerationMoved:
            return True
        except WeightwireError:
            return False
        finally:
            if asking is not self.client:
                asking.close()

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

    def _open(self, manifest: Expected, generation: int) -> ReadGrant:
        request = OpenRead(
            shard_key=self.record.shard_key,
            incarnation=self.record.incarnation,
            content_id=manifest.content_id,
            layout_digest="" if manifest.content_id else manifest.layout.digest,
            reader=self.reader.incarnation,
            reader_host=self.reader.host,
            transports=tuple(self.reader.transports),
        )
        grant = self.client.open_read(request, timeout=self.reader.stall_s)
        if not set(grant.endpoints) & set(self.reader.transports):
            raise TransferError(f"{self.label} offers no transport that works here", "see: weightwire doctor")
        if grant.generation != generation:
            raise GenerationMoved(f"{self.label} changed what it offers just now", "ask for sources again")
        return grant

    def _note_transport(self) -> None:
        """A source that does not offer our best transport is read over a slower one: that is never silent."""
        best = next(iter(self.reader.transports))
        if self.transport != best:
            self.warnings.append(
                f"{self.label} is read over {self.transport} instead of {best}, which it does not offer"
            )
            log.warning("%s", self.warnings[-1])
            process_metrics().slow_path(best, self.transport)

    def _paced(self, seconds: float) -> None:
        with self._pacing:
            self.paced_s += seconds
        process_metrics().paced(RECEIVED, seconds)

    def _follow(self, failed: Callable[[TransferError], None], offers: Callable[[int], None]) -> None:
        try:
            for update in self.client.progress(self.grant.lease, stall_s=self.reader.stall_s):
                if self._closed.is_set():
                    return
                if update.generation != self.grant.generation:
                    raise GenerationMoved(f"{self.label} withdrew what we were reading", "it is read elsewhere")
                if self.grant.rate and update.rate:
                    self._pacer.rate = update.rate
                new = leaves_of(update.ranges, self._leaves) & self.limit
                if self._provisional is not None:  # before they may be asked for
                    learn(self._provisional, update, self.label)
                if new:
                    offers(new)
        except TransferError as error:
            if not self._closed.is_set():
                failed(error)
        except (WeightwireError, ValueError) as error:  # ValueError: the channel was closed under us
            log.debug("watching %s ended: %s", self.label, error)


def _limit(manifest: Expected, status: PeerStatus) -> int:
    derived = isinstance(manifest, Provisional) or (
        isinstance(manifest, Manifest) and status.derived_id == manifest.derived_id
    )
    return mask_of(range(len(manifest.layout.leaves) if derived else manifest.layout.weight_leaves))


def leaves_of(ranges: Iterable[LeafRange], leaves: int) -> int:
    """What a peer says that it has, as bits.

    Raises:
        ProtocolError: a range is outside the ``leaves`` that there are.
    """
    found = 0
    for each in ranges:
        if not 0 <= each.first <= each.first + each.count <= leaves:
            raise ProtocolError(f"a peer offers leaves {each.first} + {each.count} of {leaves}", "use another peer")
        found |= mask_of(range(each.first, each.first + each.count))
    return found


def learn(provisional: Provisional, update: ProgressUpdate, peer: str) -> None:
    """Take over the digests of what a peer says is final there.

    Raises:
        ProtocolError: it does not tell one digest for each leaf, or another one than was told before.
    """
    count = sum(each.count for each in update.ranges)
    if len(update.digests) != count * DIGEST_BYTES:
        raise ProtocolError(f"{peer} tells {len(update.digests)} digest bytes for {count} leaves", "use another peer")
    at = 0
    for each in update.ranges:
        end = at + each.count * DIGEST_BYTES
        provisional.tell(each.first, update.digests[at:end])
        at = end


def contact(reader: Reader, candidate: Candidate) -> PeerClient:
    """As ``meet``, without what it says."""
    return meet(reader, candidate)[0]


def meet(reader: Reader, candidate: Candidate) -> tuple[PeerClient, PeerStatus]:
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
            status = client.status(record.shard_key, timeout=max(0.5, until - time.monotonic()))
        except (TransferError, AuthError) as reason:
            client.close()
            if isinstance(reason, AuthError):
                raise
            error = PeerLost(f"{peer_label(candidate)}: {reason.problem}", reason.remedy)
        else:
            return client, status
    raise error


def peer_label(candidate: Candidate) -> str:
    """How logs and reports name a peer."""
    return peer_name(candidate.record.endpoints, candidate.record.incarnation)


def peer_name(endpoints: Sequence[str], incarnation: str) -> str:
    """Where a peer is, and which process life."""
    return f"{endpoints[0] if endpoints else '?'} ({incarnation[:8]})"
