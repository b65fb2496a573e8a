"""The metadata server's whole knowledge, over a store and a clock: no network, no threads, no waiting."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from weightwire.errors import ConfigError
from weightwire.metadata import listing, slots
from weightwire.metadata.slots import Fresh, Key, Slot
from weightwire.metadata.standing import standing, unreliable_hosts
from weightwire.metadata.store.base import Store
from weightwire.wire.messages import (
    CheckResult,
    FindReplicas,
    FindShard,
    KeepAnswer,
    KeepBeat,
    KeepUpdate,
    Lease,
    PublicationRecord,
    Recheck,
    ReplicaListing,
    ShardListing,
    Withdrawal,
)
from weightwire.wire.reports import PeerFailure, ReportAnswer, SourceView

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Every duration that the registry knows, in seconds.

    Attributes:
        ttl_s: a lease lives this long after its last beat; a tombstone twice as long.
        warming_s: how long after an empty start a conflict may be hidden; None for one TTL.
        report_ttl_s: a report counts for so long.
    """

    ttl_s: float = 10.0
    warming_s: float | None = None
    report_ttl_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0.1 <= self.ttl_s <= 3600:
            raise ConfigError(f"a lease TTL of {self.ttl_s} s makes no sense", "give 0.1 to 3600 seconds")
        if self.report_ttl_s <= 0 or (self.warming_s is not None and self.warming_s < 0):
            raise ConfigError("a duration is negative", "give seconds above 0")


class Registry:
    """Leases, reports and listings. Not thread safe by itself beyond what its store is: one caller at a time.

    Args:
        store: where slots are kept.
        clock: seconds, monotonic.
        times: see :class:`Times`.
    """

    def __init__(self, store: Store, clock: Callable[[], float], times: Times | None = None) -> None:
        self._store = store
        self._clock = clock
        self.times = times or Times()
        self._arrivals = 0
        warming = self.times.ttl_s if self.times.warming_s is None else self.times.warming_s
        self._warm_at = clock() + (0.0 if store.slots() else warming)

    @property
    def warming_s(self) -> float:
        """Seconds for which sources may still be missing after an empty start."""
        return max(0.0, self._warm_at - self._clock())

    def publish(self, record: PublicationRecord) -> Lease:
        """See ``MetadataService.publish``."""
        now, ttl = self._clock(), self.times.ttl_s
        self._arrivals += 1
        fresh = Fresh(secrets.token_hex(16), self._arrivals)

        def change(slot: Slot | None) -> tuple[Slot, Slot]:
            after = slots.published(slot, record, now, ttl, fresh)
            return after, after

        slot = self._store.update((record.shard_key, record.incarnation), change)
        self._supersede(record)
        return Lease(lease_id=slot.lease_id, ttl_s=ttl)

    def keep(self, stream: str, beat: KeepBeat) -> KeepAnswer:
        """See ``MetadataService.keep``."""
        unknown: list[str] = []
        rechecks: list[Recheck] = []
        for result in beat.checks:
            self._check(result)
        for update in beat.updates:
            leaves = self._keep(stream, update)
            if leaves is None:
                unknown.append(update.lease_id)
            else:
                rechecks.extend(Recheck(lease_id=update.lease_id, leaf=leaf) for leaf in leaves)
        return KeepAnswer(unknown=tuple(unknown), rechecks=tuple(rechecks[:4096]), ttl_s=self.times.ttl_s)

    def keep_ended(self, stream: str) -> int:
        """See ``MetadataService.keep_ended``; how many leases are suspect now."""
        count = 0
        for slot in self._store.slots():
            if slot.stream == stream:
                self._store.update(slot.key, lambda known: (slots.broken(known, stream), None))
                count += 1
        return count

    def withdraw(self, message: Withdrawal) -> None:
        """See ``MetadataService.withdraw``."""
        now, ttl = self._clock(), self.times.ttl_s
        key = (message.shard_key, message.incarnation)
        self._store.update(key, lambda slot: (slots.withdrawn(slot, message, now, ttl), None))

    def find_replicas(self, query: FindReplicas) -> ReplicaListing:
        """See ``MetadataService.find_replicas``."""
        return listing.find_replicas(query, self.live(), self._clock(), self.warming_s)

    def find_shard(self, query: FindShard) -> ShardListing:
        """See ``MetadataService.find_shard``."""
        return listing.find_shard(query, self.live())

    def report(self, failure: PeerFailure, observed_host: str) -> ReportAnswer:
        """See ``MetadataService.report``."""
        now = self._clock()
        host = observed_host or failure.reporter_host

        def change(slot: Slot | None) -> tuple[Slot | None, str]:
            known = slots.alive(slot, now)
            if known is None or known.record is None:
                return slot, "it is not published any more"
            if failure.generation < known.generation:
                return slot, "its generation has moved since: no blame"
            return slots.blamed(known, failure, host, now), ""

        refusal = self._store.update((failure.shard_key, failure.incarnation), change)
        if refusal:
            return ReportAnswer(counted=False, quarantined=False, reason=refusal)
        return self._judged(failure, host)

    def sources(self, model_id: str) -> list[SourceView]:
        """See ``MetadataService.sources``."""
        live = self.live()
        unreliable = unreliable_hosts(live)
        views = [
            self._view(slot, slot.record, unreliable)
            for slot in live
            if slot.record is not None and model_id in ("", slot.record.model_id)
        ]
        return sorted(views, key=lambda v: (v.record.model_id, v.record.replica_incarnation, v.record.shard_key))

    def live(self) -> list[Slot]:
        """Slots with a record whose lease has not ended, without expired reports."""
        now = self._clock()
        return [
            slots.forgiven(slot, now, self.times.report_ttl_s)
            for slot in self._store.slots()
            if slot.record is not None and now < slot.expires_at
        ]

    def sweep(self) -> int:
        """Forget what has expired; how many slots that were."""
        now = self._clock()
        expired = [slot.key for slot in self._store.slots() if now >= slot.expires_at]
        for key in expired:
            self._store.update(key, lambda slot: (slots.alive(slot, now), None))
        return len(expired)

    def _keep(self, stream: str, update: KeepUpdate) -> tuple[int, ...] | None:
        now, ttl = self._clock(), self.times.ttl_s
        key = self._store.key_of(update.lease_id)
        if key is None:
            return None

        def change(slot: Slot | None) -> tuple[Slot | None, tuple[int, ...] | None]:
            if slot is None or slot.lease_id != update.lease_id:
                return slot, None
            after, known = slots.kept(slot, update, stream, now, ttl)
            return after, slot.rechecks if known else None

        return self._store.update(key, change)

    def _check(self, result: CheckResult) -> None:
        key = self._store.key_of(result.lease_id)
        if key is None:
            return
        self._store.update(key, lambda slot: (slots.checked(slot, result), None))
        if not result.ok:
            logger.error("process %s found leaf %d of its shard changed: quarantined", key[1], result.leaf)

    def _supersede(self, record: PublicationRecord) -> None:
        """An endpoint has one process at a time: whoever else claimed it is gone (hazard H28)."""
        taken = set(record.endpoints)
        for slot in self._store.slots():
            known = slot.record
            if known is None or slot.superseded or known.incarnation == record.incarnation:
                continue
            if taken.intersection(known.endpoints):
                logger.warning("process %s has the endpoint of %s now", record.incarnation, known.incarnation)
                self._store.update(slot.key, _superseded)

    def _judged(self, failure: PeerFailure, host: str) -> ReportAnswer:
        live = self.live()
        unreliable = unreliable_hosts(live)
        key: Key = (failure.shard_key, failure.incarnation)
        view = next((standing(slot, unreliable) for slot in live if slot.key == key), None)
        quarantined = view is not None and bool(view.quarantine)
        logger.warning(
            "process %s failed %s on %s: %s, leaf %d, %s; quarantined: %s",
            failure.incarnation,
            failure.reporter,
            host,
            failure.kind,
            failure.leaf,
            failure.detail,
            quarantined,
        )
        if host in unreliable:
            return ReportAnswer(
                counted=True, quarantined=quarantined, reason="this host accuses several sources: it may be at fault"
            )
        return ReportAnswer(counted=True, quarantined=quarantined, reason=view.quarantine if view else "")

    def _view(self, slot: Slot, record: PublicationRecord, unreliable: frozenset[str]) -> SourceView:
        now = self._clock()
        view = standing(slot, unreliable)
        return SourceView(
            record=record,
            suspect=view.suspect,
            quarantined=bool(view.quarantine),
            reports=view.reports,
            age_s=max(0.0, now - slot.arrived_at),
            remaining_s=max(0.0, slot.expires_at - now),
            note=view.quarantine,
        )


def _superseded(slot: Slot | None) -> tuple[Slot | None, None]:
    return (None if slot is None else replace(slot, superseded=True)), None
