"""The one ``Keep`` stream of a process: beats for all its leases, and what the answers ask for.

Three threads, beside gRPC's own, which draws the beats: one opens the stream, reads its answers and opens it again when
it breaks; one publishes what the server does not know, or not as it is now; one digests leaves again when the server
asks, so that a long digest stops no beat.

A beat carries state, generation, progress and load; what else changes in a record (its content id, once it is known)
is published again. A server that lost a lease gets the owner's *present* record, never a remembered one (hazards H33,
H68).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from weightwire.errors import GenerationMoved, WeightwireError
from weightwire.metadata.api import Owner
from weightwire.wire.messages import (
    CheckResult,
    KeepAnswer,
    KeepBeat,
    KeepUpdate,
    Lease,
    PublicationRecord,
    PublicationState,
    Recheck,
)
from weightwire.wire.metadata_client import KeepCall

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 10.0
OPEN_S = 3.0
"""For opening the stream, and for publishing what the server does not know."""
RETRY_S = 0.2
MAX_RETRY_S = 2.0
MAX_PENDING_CHECKS = 256


class KeepServer(Protocol):
    """What a keeper needs of a client (``MetadataClient``)."""

    def publish(self, record: PublicationRecord, *, timeout: float | None = None) -> Lease:
        """See ``Metadata.publish``."""
        ...

    def keep(self, beats: Iterator[KeepBeat], *, timeout: float) -> KeepCall:
        """Open the stream."""
        ...


class _Kept:
    """One owner: its lease, and the record that the server has."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.lease = ""
        self.published: PublicationRecord | None = None

    def update(self, record: PublicationRecord) -> KeepUpdate | None:
        """Its part of a beat; None while the server does not know it at all."""
        if self.published is None:
            return None
        # what the server would not understand yet waits for the publish; the old news keep the lease alive
        return _update(self.lease, record if self.current(record) else self.published)

    def current(self, record: PublicationRecord) -> bool:
        """Whether the server has everything of ``record`` that beats do not carry."""
        return self.published is not None and _essence(self.published) == _essence(record)


class Keeper:
    """See ``metadata.api.Keeping``. Thread safe. Its threads start with the first ``add`` and end with ``close``.

    Args:
        server: the client to publish and to beat with.
    """

    def __init__(self, server: KeepServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._kept: dict[int, _Kept] = {}
        self._ttl_s = DEFAULT_TTL_S
        self._beat = threading.Event()
        self._stale = threading.Event()
        self._closed = threading.Event()
        self._results: queue.SimpleQueue[CheckResult] = queue.SimpleQueue()
        self._checks: queue.Queue[tuple[Owner, Recheck] | None] = queue.Queue(MAX_PENDING_CHECKS)
        self._threads: list[threading.Thread] = []
        self._call: KeepCall | None = None
        self.connected = threading.Event()
        """Set while the server answers beats."""

    def add(self, owner: Owner, lease: Lease | None = None) -> None:
        """See ``Keeping.add``."""
        kept = _Kept(owner)
        record = owner.current() if lease is not None else None
        with self._lock:
            if lease is not None and record is not None:
                self._ttl_s, kept.lease, kept.published = lease.ttl_s, lease.lease_id, record
            self._kept[id(owner)] = kept
            if not self._threads and not self._closed.is_set():
                self._start("weightwire-keep", self._run)
                self._start("weightwire-publish", self._publish)
                self._start("weightwire-recheck", self._recheck)
        self.poke()

    def remove(self, owner: Owner) -> None:
        """See ``Keeping.remove``."""
        with self._lock:
            self._kept.pop(id(owner), None)

    def poke(self) -> None:
        """See ``Keeping.poke``."""
        self._beat.set()
        self._stale.set()

    def close(self) -> None:
        """End the stream and the threads; idempotent. What is still under way is waited for, for a second each."""
        self._closed.set()
        self.poke()
        call = self._call
        if call is not None:
            call.cancel()
        with contextlib.suppress(queue.Full):  # then the thread is at work, and sees _closed
            self._checks.put_nowait(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1.0)

    # the stream --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = RETRY_S
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                self._stream()
            except WeightwireError as error:
                self._say(pause, "the stream to the metadata server broke: %s; trying again", error)
            except Exception:  # the thread's edge: a bug here must not end the leases without a word
                logger.exception("the keep thread met a bug; trying again")
            self.connected.clear()
            pause = RETRY_S if time.monotonic() - began > MAX_RETRY_S else min(pause * 2, MAX_RETRY_S)
            self._closed.wait(pause)

    def _stream(self) -> None:
        call = self._server.keep(self._beats(), timeout=OPEN_S)
        self._call = call
        if self._closed.is_set():  # closed while the stream was opened
            call.cancel()
        for answer in call:
            self.connected.set()
            self._take(answer)

    def _beats(self) -> Iterator[KeepBeat]:
        while not self._closed.is_set():
            self._beat.clear()
            yield KeepBeat(updates=tuple(self._updates()), checks=tuple(self._drain_results()))
            self._beat.wait(self._ttl_s / 3)

    def _updates(self) -> Iterator[KeepUpdate]:
        for kept in self._snapshot():
            record = kept.owner.current()
            if record is None:
                self.remove(kept.owner)
                continue
            if not kept.current(record):
                self._stale.set()
            update = kept.update(record)
            if update is not None:
                yield update

    def _take(self, answer: KeepAnswer) -> None:
        self._ttl_s = max(0.1, answer.ttl_s)
        by_lease = {kept.lease: kept for kept in self._snapshot() if kept.published is not None}
        for lease in answer.unknown:
            if lease in by_lease:
                by_lease[lease].published = None
                self._stale.set()
        for recheck in answer.rechecks:
            kept = by_lease.get(recheck.lease_id)
            if kept is not None and not self._checks.full():
                self._checks.put_nowait((kept.owner, recheck))

    # publishing --------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        pause = RETRY_S
        while not self._closed.is_set():
            self._stale.wait()
            self._stale.clear()
            try:
                for kept in self._snapshot():
                    self._publish_one(kept)
                pause = RETRY_S
            except WeightwireError as error:
                self._say(pause, "a shard could not be published: %s; trying again", error)
                self._stale.set()
                self._closed.wait(pause)
                pause = min(pause * 2, MAX_RETRY_S)
            except Exception:  # the thread's edge, as above
                logger.exception("the publishing thread met a bug; going on at the next beat")

    def _publish_one(self, kept: _Kept) -> None:
        record = kept.owner.current()
        if record is None:
            self.remove(kept.owner)
        elif not kept.current(record) and not self._closed.is_set():
            lease = self._server.publish(record, timeout=OPEN_S)
            kept.lease, kept.published = lease.lease_id, record
            self._ttl_s = lease.ttl_s
            self._beat.set()
            logger.debug("published shard %s as %s", record.shard_key, record.state)

    # rechecks ----------------------------------------------------------------------------------------------------

    def _recheck(self) -> None:
        while True:
            item = self._checks.get()
            if item is None or self._closed.is_set():
                return
            owner, recheck = item
            try:
                ok = owner.recheck(recheck.leaf)
            except GenerationMoved as error:  # what was asked about is no longer offered
                logger.info("leaf %d is not digested again: %s", recheck.leaf, error.problem)
                continue
            except Exception:  # whatever an owner raises: the thread serves the other owners too
                logger.exception("leaf %d could not be digested again", recheck.leaf)
                continue
            self._results.put(CheckResult(lease_id=recheck.lease_id, leaf=recheck.leaf, ok=ok))
            self.poke()

    def _drain_results(self) -> Iterator[CheckResult]:
        while True:
            try:
                yield self._results.get_nowait()
            except queue.Empty:
                return

    # bookkeeping -------------------------------------------------------------------------------------------------

    def _snapshot(self) -> list[_Kept]:
        with self._lock:
            return list(self._kept.values())

    def _say(self, pause: float, message: str, error: WeightwireError) -> None:
        """Warn at the first failure of a series; the others are noise."""
        if not self._closed.is_set():
            logger.log(logging.WARNING if pause == RETRY_S else logging.DEBUG, message, error)

    def _start(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()


def _essence(record: PublicationRecord) -> PublicationRecord:
    """Without what beats carry."""
    return replace(
        record,
        state=PublicationState.LOADING,
        generation=0,
        sequence=0,
        fraction=0.0,
        bytes_done=0,
        active_reads=0,
    )


def _update(lease: str, record: PublicationRecord) -> KeepUpdate:
    return KeepUpdate(
        lease_id=lease,
        generation=record.generation,
        sequence=record.sequence,
        state=record.state,
        fraction=record.fraction,
        bytes_done=record.bytes_done,
        active_reads=record.active_reads,
    )
