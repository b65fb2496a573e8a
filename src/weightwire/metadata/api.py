"""What sources and targets use of the control plane: synchronous, bounded, in domain terms.

``MetadataClient`` (``metadata.client``) is the one over the network.
"""

from __future__ import annotations

from typing import Protocol

from weightwire.wire.messages import (
    FindReplicas,
    FindShard,
    Lease,
    PublicationRecord,
    ReplicaListing,
    ShardListing,
    Withdrawal,
)
from weightwire.wire.reports import PeerFailure, ReportAnswer, SourceView


class Metadata(Protocol):
    """The metadata server, as seen by a client.

    Every method raises ``MetadataUnreachable`` within its bound, ``AuthError`` when the secrets differ, and
    ``MetadataError`` when the server refuses. ``timeout`` is in seconds; None takes the client's own bound.
    """

    def publish(self, record: PublicationRecord, *, timeout: float | None = None) -> Lease:
        """Register or update one record; idempotent. Nothing is kept alive by this alone: see ``Keeping.add``."""
        ...

    def withdraw(self, withdrawal: Withdrawal, *, timeout: float | None = None) -> None:
        """Remove a record; idempotent."""
        ...

    def find_replicas(self, query: FindReplicas, *, timeout: float | None = None) -> ReplicaListing:
        """One bounded question; make an outcome of it with ``metadata.selection.choose``."""
        ...

    def find_shard(self, query: FindShard, *, timeout: float | None = None) -> ShardListing:
        """Candidates for one shard, best first."""
        ...

    def report(self, failure: PeerFailure, *, timeout: float | None = None) -> ReportAnswer:
        """Tell of a source that failed us."""
        ...

    def sources(self, model_id: str = "", *, timeout: float | None = None) -> list[SourceView]:
        """Everything that is published."""
        ...

    def decide(self, key: str, value: bytes | None, wait_s: float, *, timeout: float | None = None) -> bytes | None:
        """See ``MetadataService.decide``; the recorded value, or None."""
        ...


class Owner(Protocol):
    """Whoever answers for one publication: the source's life cycle. Called from the keeper's threads."""

    def current(self) -> PublicationRecord | None:
        """What is published *now*, with its present generation and sequence; None once it is withdrawn.

        Cheap and thread safe: called on every beat. A record that is still None-able later is never republished from
        a copy: whatever the server lost is made again from this.
        """
        ...

    def recheck(self, leaf: int) -> bool:
        """Digest one leaf again, because a reader reported it; whether it is still right. May take a while."""
        ...


class Keeping(Protocol):
    """The one ``Keep`` stream of a process, carrying all its leases."""

    def add(self, owner: Owner, lease: Lease | None = None) -> None:
        """Keep ``owner``'s publication until it says None or is removed.

        Args:
            owner: asked for its present record on every beat.
            lease: what ``publish`` answered; None to publish as soon as the server can be reached.
        """
        ...

    def remove(self, owner: Owner) -> None:
        """Stop keeping; does not withdraw. Idempotent."""
        ...

    def poke(self) -> None:
        """Send a beat now (a state changed), instead of at the next third of the TTL."""
        ...
