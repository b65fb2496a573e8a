"""One shard that this process announces, serves and withdraws: the life cycle, driven.

Decisions are the pure state machine's (``metadata.lifecycle``); this object carries its actions out, in order, and
keeps what it serves alive and unchanged until nobody reads it any more.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import nn

from weightwire.errors import GenerationMoved, ProtocolError, PublishError, WeightwireError
from weightwire.manifest.records import Layout, Manifest
from weightwire.metadata import lifecycle
from weightwire.metadata.api import Keeping, Metadata
from weightwire.metadata.lifecycle import Life
from weightwire.observability.metrics import Metrics
from weightwire.source import described
from weightwire.source.described import Claim, Holding
from weightwire.source.leases import LeaseTable
from weightwire.source.registered import Registered
from weightwire.source.scrub import digest_aside, tensors_of
from weightwire.source.snapshot import Held, Snapshot, storages
from weightwire.transport.base import Transport
from weightwire.types import Json
from weightwire.wire.messages import (
    LeafRange,
    ManifestHeader,
    OpenRead,
    PeerStatus,
    ProgressUpdate,
    PublicationRecord,
    PublicationState,
    ReadGrant,
    Withdrawal,
)

log = logging.getLogger(__name__)

LEASE_TTL_S = 30.0
"""A reader that shows no sign of life for so long has gone."""
DRAIN_S = 10.0
"""What readers get to finish before they are cut off."""
CHECK_S = 10.0
"""What one leaf that is being digested again gets to finish before its memory is given back: it takes milliseconds."""
PROGRESS_BEAT_S = 1.0
"""Between two signs of life on a progress stream; well below any reader's stall bound."""


class Home(Protocol):
    """The process that a publication lives in (``source.node.Node``)."""

    incarnation: str
    host: str
    endpoints: tuple[str, ...]
    transports: dict[str, Transport]
    metadata: Metadata
    keeper: Keeping
    metrics: Metrics

    def forget(self, publication: Publication) -> None:
        """The publication is over."""
        ...


class Publication:
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
    """

    def __init__(self, home: Home, claim: Claim, after: tuple[int, int] = (1, 0)) -> None:
        self.claim = claim
        self.leases = LeaseTable()
        self.held = Held()
        self.memory = Registered(home.transports)
        self._home = home
        self._life = Life(generation=after[0], sequence=after[1] + 1)
        self._lock = threading.RLock()
        self._quiet = threading.Event()
        self._checking = threading.Lock()  # held while a leaf is digested again; taken before ``_lock``
        self._holding: Holding | None = None
        self._retraction: lifecycle.Retract | None = None
        self._done = (0, 0)

    # ---- what its owner calls

    @property
    def over(self) -> bool:
        """Whether it was withdrawn; it never comes back."""
        return not self._life.published

    def learn(self, build_facts: Mapping[str, Json]) -> None:
        """What construction learnt, for readers to apply before they construct. Legal while ``LOADING``."""
        self.claim = dataclasses.replace(self.claim, build_facts=dict(build_facts))

    def progress(self, done: int, total: int) -> None:
        """How far loading is, in bytes; others may wait for it while this moves."""
        self._done = (done, total)

    def hold(self, holding: Holding) -> None:
        """The bytes are in place and digested: ``HELD`` until ``offer``.

        Raises:
            PublishError: no transport can serve this memory; nothing is offered then.
        """
        with self._lock:
            self._holding = holding
            self.memory.register(holding.memory)
            self._apply(lifecycle.Digested(time.monotonic()))

    def offer(self) -> None:
        """The engine says that the bytes may be read."""
        with self._lock:
            self.leases.serve(self.memory.by_name)
            self._apply(lifecycle.Offer(time.monotonic()))

    def guard(self, model: nn.Module, *, foreign: bool = False) -> Snapshot:
        """Copy-on-transform for ``model``; enter ``.guard(module)`` around every transform. ``foreign``: see there."""
        owners = self._held_now().memory.owners
        assert isinstance(owners, list)
        return Snapshot(model=model, published=storages(owners), held=self.held, foreign=foreign)

    def pause(self, drain_s: float = DRAIN_S) -> None:
        """Return once nobody reads and nobody can: the bytes may change then.

        New readers are refused at once; those under way get ``drain_s``. Idempotent.
        """
        self._quiet.clear()
        self._apply(lifecycle.Pause(time.monotonic(), drain_s))
        self._await_quiet(drain_s)

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
                holding = Holding(manifest=manifest, memory=holding.memory, weights_id=weights_id)
                self._holding = holding
            self.memory.register(holding.memory)
            self.leases.serve(self.memory.by_name)
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
    def state(self) -> PublicationState:
        """As announced."""
        return self._life.state

    @property
    def offered(self) -> Layout | None:
        """Of what may be read now; ``None`` while nothing may."""
        with self._lock:
            return self._holding.manifest.layout if self._holding and self._life.admits else None

    @property
    def served(self) -> list[str]:
        """Names of the transports that serve it."""
        return list(self.memory.by_name)

    @property
    def generation(self) -> int:
        """Of the published bytes."""
        return self._life.generation

    @property
    def sequence(self) -> int:
        """Of the last announcement."""
        return self._life.sequence

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
            if request.content_id != holding.manifest.content_id:
                raise GenerationMoved("the source holds other weights now", "ask for sources again")
            lease = self.leases.grant(request.reader, request.transports)
            now = time.monotonic()
            self._apply(lifecycle.ReaderOpened(now, lease.token, now + LEASE_TTL_S))
            try:
                endpoints = self.memory.endpoints(lease)
            except WeightwireError:
                self.close_read(lease.token)
                raise
            log.info("reader %s opened a lease (%d open)", request.reader[:8], len(self.leases))
            return ReadGrant(
                lease=lease.token, generation=self._life.generation, ttl_s=LEASE_TTL_S, endpoints=endpoints
            )

    def progress_of(self, lease: bytes, since: int) -> Iterator[ProgressUpdate]:
        """See ``PeerService.progress``: everything is readable at once, so the updates are signs of life."""
        holding = self._offered()
        generation, leaves = self._life.generation, len(holding.manifest.layout.leaves)
        ranges = (LeafRange(0, leaves),) if since == 0 and leaves else ()
        while self.leases.renew(lease) and self._life.generation == generation:
            yield ProgressUpdate(version=1, generation=generation, ranges=ranges)
            ranges = ()
            if self._quiet.wait(PROGRESS_BEAT_S):
                break
        if self._life.generation != generation or not self._life.admits:
            raise GenerationMoved("the source has withdrawn what was read", "ask for another source")

    def close_read(self, lease: bytes) -> None:
        """See ``PeerService.close_read``."""
        self.leases.drop((lease,))
        self._apply(lifecycle.ReaderClosed(time.monotonic(), lease))

    # ---- what the keeper asks (``metadata.api.Owner``)

    def current(self) -> PublicationRecord | None:
        """The record that is true now."""
        with self._lock:
            if not self._life.published:
                return None
            where = described.Where(self._home.incarnation, self._home.host, self._home.endpoints)
            return described.record(self.claim, self._holding, self._life, where, self._done, len(self.leases))

    def recheck(self, leaf: int) -> bool:
        """Digest one leaf again, reported or in turn (``source.scrub``); at the first difference all is withdrawn.

        Raises:
            GenerationMoved: nothing is offered, or it ended meanwhile: bytes may change then.
            ProtocolError: no such leaf.
        """
        with self._checking:
            with self._lock:
                holding, generation = self._offered(), self._life.generation
            layout, manifest = holding.manifest.layout, holding.manifest
            if not 0 <= leaf < len(layout.leaves):
                raise ProtocolError(f"there is no leaf {leaf}", f"leaves count from 0 to {len(layout.leaves) - 1}")
            if digest_aside(holding.memory, layout.leaves[leaf].span) == manifest.digest(leaf):
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
        if ended:  # a raw hold
            self.withdraw()

    # ---- inside

    def _apply(self, event: lifecycle.Event) -> None:
        with self._lock:
            self._life, actions = lifecycle.step(self._life, event)
            for action in actions:
                self._perform(action)
            self._home.metrics.state(self._life.state.value)
            self._home.metrics.leases(len(self.leases))

    def _perform(self, action: lifecycle.Action) -> None:
        match action:
            case lifecycle.Announce():
                self._home.keeper.poke()
            case lifecycle.Retract():
                self._retraction = action  # sent by ``_retract``, outside the lock: it waits for the network
            case lifecycle.CutReaders():
                self.leases.drop(action.leases)
            case lifecycle.Quiet():
                self._quiet.set()
            case _:  # AdmitReaders, RefuseReaders, MoveGeneration: ``_life`` itself is asked for these
                pass

    def _retract(self) -> None:
        action, self._retraction = self._retraction, None
        self._home.keeper.remove(self)
        if action is None:
            return
        message = Withdrawal(
            shard_key=self.claim.shard_key,
            incarnation=self._home.incarnation,
            generation=action.generation,
            sequence=action.sequence,
        )
        try:
            self._home.metadata.withdraw(message, timeout=2.0)
        except WeightwireError as error:
            log.warning("the metadata server was not told of the withdrawal: %s", error)

    def _await_quiet(self, drain_s: float) -> None:
        until = time.monotonic() + drain_s
        while not self._life.quiet:
            self._quiet.wait(0.02)
            self._apply(lifecycle.Tick(time.monotonic()))
        if self._checking.acquire(timeout=CHECK_S):  # a leaf that is being digested; no other one is begun
            self._checking.release()
        else:
            log.error("a leaf is still being digested after %.0f s; its memory must stay", CHECK_S)
        self.leases.serve({})
        self.memory.release(until)

    def _offered(self) -> Holding:
        if not self._life.admits or self._holding is None:
            raise GenerationMoved(f"the shard is {self._life.state}, not offered", "ask for another source")
        return self._holding

    def _held_now(self) -> Holding:
        if self._holding is None:
            raise PublishError("nothing is held", "publish first")
        return self._holding
