"""A publication's life cycle, driven: the pure state machine decides (``metadata.lifecycle``), this carries it out.

What it serves stays registered, alive and unchanged until nobody reads it any more.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from weightwire.errors import WeightwireError
from weightwire.manifest.availability import Availability
from weightwire.metadata import lifecycle
from weightwire.metadata.api import Keeping, Metadata
from weightwire.metadata.lifecycle import Life
from weightwire.observability.metrics import Metrics
from weightwire.source.described import Claim
from weightwire.source.leases import LeaseTable
from weightwire.source.registered import Registered
from weightwire.transport.base import Transport
from weightwire.wire.messages import PublicationRecord, PublicationState, Withdrawal

log = logging.getLogger(__name__)

DRAIN_S = 10.0
"""What readers get to finish before they are cut off."""
CHECK_S = 10.0
"""What one leaf that is being digested again gets to finish before its memory is given back: it takes milliseconds."""


class Home(Protocol):
    """The process that a publication lives in (``source.node.Node``)."""

    incarnation: str
    host: str
    endpoints: tuple[str, ...]
    transports: dict[str, Transport]
    metadata: Metadata
    keeper: Keeping
    metrics: Metrics

    def forget(self, publication: Driven) -> None:
        """The publication is over."""
        ...


class Driven:
    """The part of a publication that moves. Thread-safe.

    Args:
        home: the process.
        claim: what it is of.
        after: generation and sequence at which an earlier publication of this key ended.
    """

    def __init__(self, home: Home, claim: Claim, after: tuple[int, int]) -> None:
        self.claim = claim
        self.leases = LeaseTable()
        self.memory = Registered(home.transports)
        self._home = home
        self._life = Life(generation=after[0], sequence=after[1] + 1)
        self._lock = threading.RLock()
        self._quiet = threading.Event()
        self._checking = threading.Lock()  # held while a leaf is digested again; taken before ``_lock``
        self._available = Availability(0)
        self._retraction: lifecycle.Retract | None = None

    def current(self) -> PublicationRecord | None:
        """The record that is true now; ``None`` once it is over."""
        raise NotImplementedError

    def recheck(self, leaf: int) -> bool:
        """Whether ``leaf`` still is what was published."""
        raise NotImplementedError

    @property
    def over(self) -> bool:
        """Whether it was withdrawn; it never comes back."""
        return not self._life.published

    @property
    def state(self) -> PublicationState:
        """As announced."""
        return self._life.state

    @property
    def generation(self) -> int:
        """Of the published bytes."""
        return self._life.generation

    @property
    def sequence(self) -> int:
        """Of the last announcement."""
        return self._life.sequence

    def pause(self, drain_s: float = DRAIN_S) -> None:
        """Return once nobody reads and nobody can; the bytes may change then.

        New readers are refused at once; those under way get ``drain_s``. Idempotent.
        """
        self._quiet.clear()
        self._apply(lifecycle.Pause(time.monotonic(), drain_s))
        self._await_quiet(drain_s)

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
                self._available.poke()
            case lifecycle.MoveGeneration():
                self._available.poke()  # whoever follows what there is learns it now
            case _:  # AdmitReaders, RefuseReaders: ``_life`` itself is asked for these
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
