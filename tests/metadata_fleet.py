"""A registry without a network, and the sources that register in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from wire_samples import rank

from weightwire.metadata.registry import Registry, Times
from weightwire.metadata.store.memory import MemoryStore
from weightwire.wire.messages import (
    FindReplicas,
    FindShard,
    KeepBeat,
    KeepUpdate,
    Lease,
    PublicationRecord,
    ReplicaListing,
    Withdrawal,
)
from weightwire.wire.messages import PublicationState as S
from weightwire.wire.reports import FailureKind, PeerFailure

TTL = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Fleet:
    """A registry and the sources that keep their leases in it, warm from the start."""

    def __init__(self, *, warm: bool = True) -> None:
        self.clock = Clock()
        self.store = MemoryStore()
        self.registry = Registry(self.store, self.clock, Times(ttl_s=TTL, warming_s=0 if warm else None))
        self.leases: dict[tuple[str, str], Lease] = {}

    def publish(self, *records: PublicationRecord) -> None:
        for record in records:
            self.leases[record.shard_key, record.incarnation] = self.registry.publish(record)

    def replica(self, life: str, **changes: Any) -> None:
        self.publish(rank(0, life, **changes), rank(1, life, **changes))

    def beat(self, *records: PublicationRecord, stream: str = "s") -> tuple[str, ...]:
        updates = tuple(
            KeepUpdate(
                lease_id=self.leases[r.shard_key, r.incarnation].lease_id,
                generation=r.generation,
                sequence=r.sequence,
                state=r.state,
                fraction=r.fraction,
                bytes_done=r.bytes_done,
                active_reads=r.active_reads,
            )
            for r in records
        )
        return self.registry.keep(stream, KeepBeat(updates=updates)).unknown

    def withdraw(self, record: PublicationRecord) -> None:
        self.registry.withdraw(
            Withdrawal(
                shard_key=record.shard_key,
                incarnation=record.incarnation,
                generation=record.generation + 1,
                sequence=record.sequence + 1,
            )
        )

    def find(self, *keys: str, **changes: Any) -> ReplicaListing:
        return self.registry.find_replicas(
            FindReplicas(replica_keys=keys or ("replica",), model_id="org/model", **changes)
        )

    def shard(self, number: int = 0, weights: str = "weights") -> list[str]:
        listing = self.registry.find_shard(FindShard(shard_key=f"shard-{number}", weights_id=weights))
        return [candidate.record.incarnation for candidate in listing.candidates]

    def report(self, life: str, host: str, **changes: Any) -> Any:
        failure = PeerFailure(
            shard_key="shard-0",
            incarnation=f"{life}-0",
            generation=1,
            kind=FailureKind.MISMATCH,
            leaf=4,
            reporter="reader",
            reporter_host=host,
        )
        return self.registry.report(dataclasses.replace(failure, **changes), "")

    def rechecks(self, life: str) -> list[int]:
        record = rank(0, life)
        update = KeepUpdate(
            lease_id=self.leases[record.shard_key, record.incarnation].lease_id,
            generation=1,
            sequence=1,
            state=S.READY,
        )
        return [item.leaf for item in self.registry.keep("s", KeepBeat(updates=(update,))).rechecks]
