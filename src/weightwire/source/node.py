"""One process as a source: its incarnation, its endpoints, and everything that it publishes."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from weightwire.auth import Secret
from weightwire.errors import GenerationMoved, ProtocolError, WeightwireError
from weightwire.manifest.records import Manifest
from weightwire.metadata.api import Keeping, Metadata
from weightwire.observability.metrics import SERVED
from weightwire.source.caps import Caps
from weightwire.source.described import Claim
from weightwire.source.driven import Driven
from weightwire.source.leases import ReadLease
from weightwire.source.publication import Publication
from weightwire.source.scrub import Scrub
from weightwire.transport.base import ReadGate, Registration, Transport
from weightwire.transport.host import host_id
from weightwire.types import Span
from weightwire.wire.messages import Lease, ManifestHeader, OpenRead, PeerStatus, ProgressUpdate, ReadGrant
from weightwire.wire.peer_service import PeerServer

log = logging.getLogger(__name__)

ANNOUNCE_S = 1.0
TICK_S = 0.5
STOP_S = 2.0

Transports = Callable[[Callable[[str], ReadGate]], Mapping[str, Transport]]
"""Opens the transports that serve, given a gate for each by name."""


class Node:
    """A ``PeerService`` with its servers. Open until ``close``, which withdraws everything.

    Args:
        metadata: where publications are announced.
        keeper: keeps their leases.
        secret: the shared secret.
        open_transports: see :data:`Transports`.
        bind: address that the peer endpoint listens on.
        advertise: address or name under which other hosts reach it.
        caps: of everything that it serves; none where left out.

    Attributes:
        scrub: of everything that it offers.

    Raises:
        ConfigError: an address cannot be listened on.
    """

    def __init__(
        self,
        *,
        metadata: Metadata,
        keeper: Keeping,
        secret: Secret,
        open_transports: Transports,
        bind: str,
        advertise: str,
        caps: Caps | None = None,
    ) -> None:
        self.incarnation = uuid.uuid4().hex
        self.host = host_id()
        self.metadata = metadata
        self.keeper = keeper
        self.caps = caps or Caps()
        self.metrics = self.caps.metrics
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._publications: dict[str, Publication] = {}
        self._ended: dict[str, tuple[int, int]] = {}  # generation and sequence that the next of the key goes on from
        self._closing = threading.Event()
        self.transports = dict(open_transports(lambda name: _Gate(self, name)))
        self._server = PeerServer(self, secret, bind)
        host = f"[{advertise}]" if ":" in advertise else advertise
        self.endpoints: tuple[str, ...] = (f"{host}:{self._server.port}",)
        self._ticker = threading.Thread(target=self._tick, name="weightwire-tick", daemon=True)
        self._ticker.start()
        self.scrub = Scrub(publications=self._by_key)
        threading.Thread(target=self.scrub.run, args=(self._closing,), name="weightwire-scrub", daemon=True).start()

    def announce(self, claim: Claim) -> Publication:
        """Tell the metadata server that this shard is being loaded here; bytes follow with ``hold`` and ``offer``.

        Returns once the server has it, so that whoever asks it afterwards knows who came earlier; where it cannot be
        reached within ``ANNOUNCE_S``, it is told later. One under that key that is over is first withdrawn to its end.

        Raises:
            ProtocolError: this process already publishes under that key.
        """
        with self._lock:
            ended = self._publications.get(claim.shard_key)
        if ended is not None and ended.over:
            ended.withdraw(0.0)  # it found its bytes changed, and may be withdrawing itself still
        with self._lock:
            if claim.shard_key in self._publications:
                raise ProtocolError("this process already publishes this shard", "withdraw the other one first")
            publication = Publication(self, claim, self._ended.get(claim.shard_key, (1, 0)))
            self._publications[claim.shard_key] = publication
        self.keeper.add(publication, self._register(publication))
        return publication

    def _register(self, publication: Publication) -> Lease | None:
        record = publication.current()
        assert record is not None
        try:
            return self.metadata.publish(record, timeout=ANNOUNCE_S)
        except WeightwireError as error:
            log.info("the shard is announced later: %s", error)
            return None

    def forget(self, publication: Driven) -> None:
        """See ``driven.Home``."""
        with self._lock:
            if self._publications.get(publication.claim.shard_key) is publication:
                del self._publications[publication.claim.shard_key]
                self._ended[publication.claim.shard_key] = publication.generation, publication.sequence

    def close(self, drain_s: float = STOP_S) -> None:
        """Withdraw everything, give readers ``drain_s``, stop serving. Bounded; idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        with self._lock:
            open_ = list(self._publications.values())
        for publication in open_:
            publication.withdraw(drain_s)
        self._server.stop(STOP_S)
        for transport in self.transports.values():
            transport.close()

    # ---- PeerService

    def status(self, shard_key: str) -> PeerStatus:
        """See ``PeerService``."""
        return self._publication(shard_key).status()

    def manifest(self, shard_key: str) -> tuple[ManifestHeader, Manifest]:
        """See ``PeerService``."""
        return self._publication(shard_key).manifest()

    def open_read(self, request: OpenRead) -> ReadGrant:
        """See ``PeerService``.

        Raises:
            SourceBusy: as many processes as may are reading from this one.
        """
        publication = self._publication(request.shard_key)
        with self._opening:  # two that come together must not both get the last place
            self.caps.check(request.reader, self._leases())
            grant = publication.open_read(request)
        return replace(grant, rate=self._part())

    def progress(self, lease: bytes, since: int) -> Iterator[ProgressUpdate]:
        """See ``PeerService``; each update says what the reader may have from then on."""
        for update in self._under(lease).progress_of(lease, since):
            yield replace(update, rate=self._part())

    def close_read(self, lease: bytes) -> None:
        """See ``PeerService``."""
        for publication in self._all():
            if lease in publication.leases:
                publication.close_read(lease)

    def self_check(self, shard_key: str, leaf: int) -> bool:
        """See ``PeerService``."""
        return self._publication(shard_key).recheck(leaf)

    def admit(self, lease: bytes, span: Span, transport: str) -> Registration:
        """What a transport may serve under ``lease``; see ``LeaseTable.admit``."""
        publication = self._under(lease)
        registration = publication.admit(lease, span, transport)
        if publication.leases.sees(lease, transport):
            self._part()
        self.metrics.moved(transport, SERVED, span.nbytes)
        return registration

    def _leases(self) -> list[ReadLease]:
        return [lease for publication in self._all() for lease in publication.leases.open()]

    def _part(self) -> float:
        return self.caps.part(self._leases(), self.transports) if self.caps.max_rate else 0.0

    def _publication(self, shard_key: str) -> Publication:
        with self._lock:
            found = self._publications.get(shard_key)
        if found is None:
            raise GenerationMoved("this shard is not published here", "ask for another source")
        return found

    def _under(self, lease: bytes) -> Publication:
        for publication in self._all():
            if lease in publication.leases:
                return publication
        raise GenerationMoved("the read lease is over", "open a new one; the source may have withdrawn")

    def _all(self) -> list[Publication]:
        return list(self._by_key().values())

    def _by_key(self) -> dict[str, Publication]:
        with self._lock:
            return dict(self._publications)

    def _tick(self) -> None:
        while not self._closing.wait(TICK_S):
            began = time.monotonic()
            for publication in self._all():
                publication.tick()
            self._part()
            if time.monotonic() - began > TICK_S:
                log.debug("a tick took %.1f s", time.monotonic() - began)


class _Gate:
    """A transport's gate: the node's, with the transport's name."""

    def __init__(self, node: Node, transport: str) -> None:
        self._node = node
        self._transport = transport

    def admit(self, lease: bytes, span: Span) -> Registration:
        """See ``transport.base.ReadGate``."""
        return self._node.admit(lease, span, self._transport)
