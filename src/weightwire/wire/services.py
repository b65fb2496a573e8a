"""What a server of each kind must be able to do, in domain terms; the gRPC adapters stand in front of these.

Whatever these raise from ``weightwire.errors`` reaches the client as the same error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from weightwire.manifest.records import Manifest
from weightwire.wire.messages import (
    FindReplicas,
    FindShard,
    KeepAnswer,
    KeepBeat,
    Lease,
    ManifestHeader,
    OpenRead,
    PeerStatus,
    ProgressUpdate,
    PublicationRecord,
    ReadGrant,
    ReplicaListing,
    ShardListing,
    Withdrawal,
)
from weightwire.wire.reports import (
    Decision,
    PeerFailure,
    ReportAnswer,
    SourceView,
)


class MetadataService(Protocol):
    """The metadata server behind its gRPC face. Driven by one event loop; methods do not block it."""

    async def publish(self, record: PublicationRecord) -> Lease:
        """Create or replace one rank's record; repeating a message is harmless.

        Raises:
            MetadataError: a later message about this publication was applied before, or the server is full.
            ProtocolError: a record that contradicts itself.
        """
        ...

    async def keep(self, stream: str, beat: KeepBeat) -> KeepAnswer:
        """Apply one beat of the stream named ``stream`` (unique among all streams of this server's life)."""
        ...

    async def keep_ended(self, stream: str) -> None:
        """The stream broke or ended: its leases are SUSPECT at once."""
        ...

    async def withdraw(self, withdrawal: Withdrawal) -> None:
        """Remove a record and leave a tombstone; idempotent, also for what was never known."""
        ...

    async def find_replicas(self, query: FindReplicas) -> ReplicaListing:
        """Complete replicas by weights id, what is loading, what exists otherwise, and what was rejected."""
        ...

    async def find_shard(self, query: FindShard) -> ShardListing:
        """Sources of one shard of one set of weights, best first."""
        ...

    async def report(self, failure: PeerFailure, observed_host: str) -> ReportAnswer:
        """Take note of a failed source.

        Args:
            failure: what the reporter says.
            observed_host: the address that the report came from, "" where that says nothing (loopback).
        """
        ...

    async def sources(self, model_id: str) -> list[SourceView]:
        """All publications ("" for every model), in a stable order."""
        ...

    async def decide(self, key: str, value: bytes | None, wait_s: float) -> Decision:
        """Record ``value`` under ``key`` unless something is, and return what is recorded.

        With ``value`` None, wait up to ``wait_s`` for something to be recorded.

        Raises:
            MetadataError: the server holds too many decisions.
        """
        ...


class PeerService(Protocol):
    """One process's peer endpoint. Called from several threads at a time; every call returns within a bound.

    The adapter has checked the credential and that the caller means *this* incarnation (another one is refused with
    ``PeerLost``), and bounds what it passes on. A shard key that is not (or no longer) published raises
    ``GenerationMoved``.
    """

    @property
    def incarnation(self) -> str:
        """The one process life that this endpoint speaks for."""
        ...

    def status(self, shard_key: str) -> PeerStatus:
        """Generation and state, also while paused or held.

        Raises:
            GenerationMoved: not published, or withdrawn.
        """
        ...

    def manifest(self, shard_key: str) -> tuple[ManifestHeader, Manifest]:
        """The manifest of the present generation.

        Raises:
            GenerationMoved: not published, withdrawn, or not offered at the moment.
        """
        ...

    def open_read(self, request: OpenRead) -> ReadGrant:
        """Grant a read lease on the present generation, with endpoints for those transports that both sides have.

        Raises:
            GenerationMoved: not offered, or its content id is another one now.
            TransferError: no transport in common, or too many readers.
        """
        ...

    def progress(self, lease: bytes, since: int) -> Iterator[ProgressUpdate]:
        """Updates after version ``since``, then further ones as they come.

        Yields at least every few seconds (an empty update, too), so that a reader can tell slow from dead, and ends
        after ``complete``. The adapter closes the iterator when the reader goes away.

        Raises:
            GenerationMoved: the lease is over.
            ProtocolError: the lease was never granted.
        """
        ...

    def close_read(self, lease: bytes) -> None:
        """Give a read lease back; idempotent."""
        ...

    def self_check(self, shard_key: str, leaf: int) -> bool:
        """Digest one leaf again; whether it still is what the manifest says.

        Raises:
            GenerationMoved: not published any more.
            ProtocolError: no such leaf.
        """
        ...
