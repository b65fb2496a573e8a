"""The metadata server's RPCs in domain terms, synchronous; ``metadata.client`` builds on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from weightwire.auth import Secret
from weightwire.wire.channel import Channel
from weightwire.wire.codec import decode, encode
from weightwire.wire.messages import (
    FindReplicas,
    FindShard,
    KeepAnswer,
    KeepBeat,
    Lease,
    PublicationRecord,
    ReplicaListing,
    ShardListing,
    Withdrawal,
)
from weightwire.wire.methods import METADATA
from weightwire.wire.reports import (
    Decision,
    PeerFailure,
    ReportAnswer,
    SourceView,
)
from weightwire.wire.requests import DecideRequest, SourcesRequest
from weightwire.wire.status import Callee

MAX_SOURCES = 100_000


class KeepCall:
    """One open ``Keep`` stream: iterate its answers; ``cancel`` from any thread ends the iteration."""

    def __init__(self, channel: Channel, call: Any) -> None:
        self._channel = channel
        self._call = call

    def __iter__(self) -> Iterator[KeepAnswer]:
        """Answers, one per beat.

        Raises:
            MetadataUnreachable: the stream broke (or was cancelled).
        """
        with self._channel.translated():
            for message in self._call:
                yield decode(KeepAnswer, message)

    def cancel(self) -> None:
        """End the stream."""
        self._call.cancel()


class MetadataStub:
    """Every RPC, with an explicit timeout in seconds. Errors as ``wire.status`` has them. Thread safe."""

    def __init__(self, target: str, secret: Secret) -> None:
        self._channel = Channel(target, secret, Callee.METADATA)

    def publish(self, record: PublicationRecord, timeout: float) -> Lease:
        """See ``MetadataService.publish``."""
        return decode(Lease, self._unary("Publish", record, timeout))

    def withdraw(self, withdrawal: Withdrawal, timeout: float) -> None:
        """See ``MetadataService.withdraw``."""
        self._unary("Withdraw", withdrawal, timeout)

    def find_replicas(self, query: FindReplicas, timeout: float) -> ReplicaListing:
        """See ``MetadataService.find_replicas``."""
        return decode(ReplicaListing, self._unary("FindReplicas", query, timeout))

    def find_shard(self, query: FindShard, timeout: float) -> ShardListing:
        """See ``MetadataService.find_shard``."""
        return decode(ShardListing, self._unary("FindShard", query, timeout))

    def report(self, failure: PeerFailure, timeout: float) -> ReportAnswer:
        """See ``MetadataService.report``."""
        return decode(ReportAnswer, self._unary("Report", failure, timeout))

    def decide(self, key: str, value: bytes | None, wait_s: float, timeout: float) -> Decision:
        """See ``MetadataService.decide``."""
        return decode(Decision, self._unary("Decide", DecideRequest(key, value, wait_s), timeout))

    def sources(self, model_id: str, timeout: float) -> list[SourceView]:
        """See ``MetadataService.sources``."""
        method = METADATA["Sources"]
        request = encode(SourcesRequest(model_id), method.request)
        found: list[SourceView] = []
        for message in self._channel.stream(method, request, timeout):
            found.append(decode(SourceView, message))
            if len(found) == MAX_SOURCES:
                break
        return found

    def keep(self, beats: Iterator[KeepBeat], timeout: float) -> KeepCall:
        """Open the stream; ``beats`` is drawn from by a thread of gRPC's and decides the rhythm."""
        method = METADATA["Keep"]
        messages = (encode(beat, method.request) for beat in beats)
        with self._channel.translated():
            return KeepCall(self._channel, self._channel.duplex(method, messages, timeout))

    def close(self) -> None:
        """End all calls; idempotent."""
        self._channel.close()

    def _unary(self, name: str, value: object, timeout: float) -> Any:
        method = METADATA[name]
        return self._channel.unary(method, encode(value, method.request), timeout)
