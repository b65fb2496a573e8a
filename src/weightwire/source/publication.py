"""One shard that this process announces, serves and withdraws.

It is announced while it loads. What is read from a disk is held, then offered, once all of it is there; what comes
from a peer is passed on meanwhile, leaf by leaf (``relay``), under the same registrations, generation and leases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from torch import nn

from weightwire.errors import GenerationMoved, ProtocolError, PublishError, WeightwireError
from weightwire.manifest.availability import Availability
from weightwire.manifest.records import Layout, Manifest
from weightwire.metadata import lifecycle
from weightwire.observability.metrics import SERVED
from weightwire.source import described
from weightwire.source.described import Claim, Holding
from weightwire.source.driven import DRAIN_S, Driven, Home
from weightwire.source.filling import News, Readable
from weightwire.source.scrub import digest_aside, tensors_of
from weightwire.source.snapshot import Held, Snapshot, storages
from weightwire.transport.base import Registration
from weightwire.types import Json, Span
from weightwire.wire.messages import (
    ManifestHeader,
    OpenRead,
    PeerStatus,
    ProgressUpdate,
    PublicationRecord,
    PublicationState,
    ReadGrant,
)

log = logging.getLogger(__name__)

LEASE_TTL_S = 30.0
"""A reader that shows no sign of life for so long has gone."""
RELAY_DRAIN_S = 5.0
"""What readers of a relay get to finish where it turns out to hold something else than it passed on."""


class Publication(Driven):
    """Made by ``Node.announce``; ``LOADING`` at first. Thread-safe. See the module.

    Args:
        home: the process.
        claim: what it is of.
        after: generation and sequence at which an earlier publication of this key ended; the server's tombstone
            refuses whatever is not later (hazard H68).

    Attributes:
        claim: what it is of.
        leases: open read leases.
        held: bytes kept a second time for readers of the raw stage.
        memory: registered; says by which transports, and why not by others.
        relayed: bytes that others asked for, over transports that tell, before this shard was complete.
    """

    def __init__(self, home: Home, claim: Claim, after: tuple[int, int] = (1, 0)) -> None:
        super().__init__(home, claim, after)
        self.held = Held()
        self.relayed = 0
        self._holding: Holding | None = None
        self._done = (0, 0)
        self._exposed = False  # a reader of a relay could write, and nobody has looked since

    # ---- what its owner calls

    def learn(self, build_facts: Mapping[str, Json], ordinal: int | None = None) -> None:
        """What construction learnt, for readers to apply before they construct. Legal while ``LOADING``.

        Args:
            build_facts: all of them.
            ordinal: of the weights, where they turned out to be a peer's.
        """
        known = self.claim.ordinal if ordinal is None else ordinal
        self.claim = dataclasses.replace(self.claim, build_facts=dict(build_facts), ordinal=known)

    def progress(self, done: int, total: int) -> None:
        """How far loading is, in bytes; others may wait for it while this moves."""
        self._done = (done, total)

    def relay(self, holding: Holding, available: Availability) -> Mapping[str, Registration]:
        """Pass on what is being received, from now on: exactly those leaves that are in ``available``.

        Args:
            holding: what the bytes are to be, and where; registered now, once, for receiving and for serving.
            available: its leaves that are there; whoever fills the memory adds to it.

        Returns:
            What to read into, by transport.

        Raises:
            PublishError: it is not ``LOADING``, or no transport can serve this memory; nothing is offered then.
        """
        with self._lock:
            if self.state is not PublicationState.LOADING:
                raise PublishError(f"a shard that is {self.state} cannot become a relay", "relay while it is LOADING")
            self.memory.register(holding.memory)
            self._holding, self._available = holding, available
            self._serve()
            self._apply(lifecycle.RelayBegan(time.monotonic()))
            return dict(self.memory.by_name)

    def hold(self, holding: Holding) -> None:
        """The bytes are in place and digested: ``HELD`` until ``offer``; a relay goes on as one until then.

        A relay that was told other derived bytes, or whose memory is elsewhere now, lets its readers finish, and goes
        on under another generation.

        Raises:
            PublishError: no transport can serve this memory; nothing is offered then.
        """
        with self._lock:
            if not self._life.relays:
                self._take(holding)
                self.memory.register(holding.memory)
            before = self._held_now()
            if not self._life.relays or (described.same(before, holding) and self._available.complete):
                self._holding = dataclasses.replace(holding, following=before.following)
                self._apply(lifecycle.Digested(time.monotonic()))
                return
        log.info("what was relayed of %s is not quite what is held now", self.claim.shard_key[:12])
        self.pause(RELAY_DRAIN_S)
        with self._lock:
            self._take(holding)
            self._apply(lifecycle.Digested(time.monotonic()))
        self.resume()

    def offer(self) -> None:
        """The engine says that the bytes may be read."""
        with self._lock:
            self._apply(lifecycle.Offer(time.monotonic()))
            self._serve()

    def guard(self, model: nn.Module, *, foreign: bool = False) -> Snapshot:
        """Copy-on-transform for ``model``; enter ``.guard(module)`` around every transform. ``foreign``: see there."""
        owners = self._held_now().memory.owners
        assert isinstance(owners, list)
        return Snapshot(model=model, published=storages(owners), held=self.held, foreign=foreign)

    def resume(self, manifest: Manifest | None = None, weights_id: str = "") -> None:
        """Offer again after ``pause``.

        Args:
            manifest: of the new bytes, if they changed.
            weights_id: of the replica with the new bytes, if they changed.
        """
        with self._lock:
            if self.over:  # before anything is registered: a failed recheck withdraws by itself
                raise PublishError("a withdrawn shard cannot be resumed", "publish it anew")
            holding = self._held_now()
            if manifest is not None:
                self._take(Holding(manifest=manifest, memory=holding.memory, weights_id=weights_id))
            self.memory.register(holding.memory)
            self._serve()
            self._quiet.clear()
            self._apply(lifecycle.Resume(time.monotonic()))

    def withdraw(self, drain_s: float = DRAIN_S) -> None:
        """End it: no new readers, another generation, and the server is told; readers get ``drain_s`` to leave.

        Returns when the bytes may change or be freed, also with the server down. Idempotent.
        """
        if self._life.published:
            self._quiet.clear()
            self._apply(lifecycle.Withdraw(time.monotonic(), drain_s))
        self._retract()
        self._await_quiet(drain_s)
        self._home.forget(self)
        self._holding = None
        self.held.released()

    # ---- what the peer endpoint asks

    @property
    def offered(self) -> Layout | None:
        """Of what may be read now; ``None`` while nothing may."""
        with self._lock:
            return self._holding.manifest.layout if self._holding and self._life.admits else None

    @property
    def relays(self) -> bool:
        """Whether it is a relay, also one that is complete and not offered yet, or paused."""
        return self._life.relays

    @property
    def on_device(self) -> bool:
        """Whether some of what is held is not in host memory."""
        with self._lock:
            return self._holding is not None and bool(self._holding.memory.devices() - {"cpu"})

    @property
    def served(self) -> list[str]:
        """Names of the transports that serve it."""
        return list(self.memory.by_name)

    def status(self) -> PeerStatus:
        """See ``PeerService.status``."""
        with self._lock:
            return described.status(self.claim, self._holding, self._life, self._home.incarnation)

    def manifest(self) -> tuple[ManifestHeader, Manifest]:
        """See ``PeerService.manifest``."""
        with self._lock:
            holding = self._offered()
            header = described.header(self.claim, holding, self._life, self._home.incarnation)
            return header, holding.manifest

    def open_read(self, request: OpenRead) -> ReadGrant:
        """See ``PeerService.open_read``."""
        with self._lock:
            holding = self._offered()
            if not holding.fits(request):
                raise GenerationMoved("the source holds other weights now", "ask for sources again")
            lease = self.leases.grant(request.reader, request.transports, told=bool(request.layout_digest))
            self._exposed |= self._life.relays and self.memory.writable(lease)
            now = time.monotonic()
            self._apply(lifecycle.ReaderOpened(now, lease.token, now + LEASE_TTL_S))
            try:
                endpoints = self.memory.endpoints(lease)
            except WeightwireError:
                self.close_read(lease.token)
                raise
            self._home.keeper.poke()  # the next newcomer goes elsewhere
            log.info("reader %s opened a lease (%d open)", request.reader[:8], len(self.leases))
            return ReadGrant(
                lease=lease.token, generation=self._life.generation, ttl_s=LEASE_TTL_S, endpoints=endpoints
            )

    def progress_of(self, lease: bytes, since: int) -> Iterator[ProgressUpdate]:
        """See ``PeerService.progress``; once everything is readable, the updates are signs of life."""
        with self._lock:
            self._offered()
            generation, news = self._life.generation, News(self._available, since)
        while self.leases.renew(lease) and self._life.generation == generation:
            yield described.told(news.next(generation), self._holding if self.leases.told(lease) else None)
            if news.wait(self._quiet):
                break
        if self._life.generation != generation or not self._life.admits or lease not in self.leases:
            raise GenerationMoved("the source has withdrawn what was read", "ask for another source")

    def admit(self, lease: bytes, span: Span, transport: str) -> Registration:
        """See ``LeaseTable.admit``."""
        registration = self.leases.admit(lease, span, transport)
        if not self._available.complete:
            with self._lock:
                self.relayed += span.nbytes
            self._home.metrics.relayed(SERVED, span.nbytes)
        return registration

    def close_read(self, lease: bytes) -> None:
        """See ``PeerService.close_read``."""
        self.leases.drop((lease,))
        self._apply(lifecycle.ReaderClosed(time.monotonic(), lease))
        self._home.keeper.poke()

    # ---- what the keeper asks (``metadata.api.Owner``)

    def current(self) -> PublicationRecord | None:
        """The record that is true now."""
        with self._lock:
            if not self._life.published:
                return None
            where = described.Where(self._home.incarnation, self._home.host, self._home.endpoints)
            record = described.record(self.claim, self._holding, self._life, where, self._done, len(self.leases))
            return described.filling(record, self._available) if self._holding else record

    def recheck(self, leaf: int) -> bool:
        """Digest one leaf again, reported or in turn (``source.scrub``); at the first difference all is withdrawn.

        Raises:
            GenerationMoved: nothing is offered, or it ended meanwhile: bytes may change then; or it is not there yet.
            ProtocolError: no such leaf.
        """
        with self._checking:
            with self._lock:
                holding, generation = self._offered(), self._life.generation
            layout = holding.manifest.layout
            if not 0 <= leaf < len(layout.leaves):
                raise ProtocolError(f"there is no leaf {leaf}", f"leaves count from 0 to {len(layout.leaves) - 1}")
            if not self._available.covers(leaf, 1):
                raise GenerationMoved(f"leaf {leaf} is not there yet", "it is verified as it arrives")
            if digest_aside(holding.memory, layout.leaves[leaf].span) == holding.digests(leaf, 1):
                return True
            with self._lock:
                if self._offered() is not holding or self._life.generation != generation:
                    raise GenerationMoved("the bytes were about to change", "ask for sources again")
                self._quiet.clear()
                self._apply(lifecycle.SelfCheckFailed(time.monotonic(), 0.0))  # readers gain nothing from bad bytes
        log.error(
            "leaf %d (%s) is no longer what was published: withdrawing %s; publish again what the model holds now",
            leaf,
            tensors_of(layout, leaf),
            self.claim.shard_key[:12],
        )
        threading.Thread(target=self.withdraw, args=(0.0,), name="weightwire-withdraw", daemon=True).start()
        return False

    def tick(self) -> None:
        """Let time pass: leases expire, a raw hold ends. Called by the node every second or so."""
        with self._lock:  # a failed recheck may end it at any moment
            now, published = time.monotonic(), self._life.published
            for token, used in self.leases.used().items():
                if self._life.admits or token in self._life.readers:
                    self._apply(lifecycle.ReaderOpened(now, token, used + LEASE_TTL_S))
            self._apply(lifecycle.Tick(now))
            ended = published and not self._life.published
            look = self._exposed and self._life.digested and not self._life.readers
            self._exposed &= not look
        if ended:  # a raw hold
            self.withdraw()
        elif look:
            threading.Thread(target=self._look_again, name="weightwire-recheck", daemon=True).start()

    # ---- inside

    def _look_again(self) -> None:
        """All of it, after the last reader of a relay that could have written to it has left."""
        log.info("digesting %s again: readers that could write to it have left", self.claim.shard_key[:12])
        layout = self.offered
        with contextlib.suppress(WeightwireError):  # it was paused or withdrawn meanwhile
            all(self.recheck(leaf) for leaf in range(len(layout.leaves) if layout else 0))

    def _take(self, holding: Holding) -> None:
        """All of ``holding`` is in place."""
        leaves = len(holding.manifest.layout.leaves)
        self._holding, self._available = holding, Availability(leaves, (1 << leaves) - 1)

    def _serve(self) -> None:
        self.leases.serve(self.memory.by_name, Readable(self._held_now().manifest.layout, self._available))

    def _offered(self) -> Holding:
        if not self._life.admits or self._holding is None:
            raise GenerationMoved(f"the shard is {self._life.state}, not offered", "ask for another source")
        return self._holding

    def _held_now(self) -> Holding:
        if self._holding is None:
            raise PublishError("nothing is held", "publish first")
        return self._holding
