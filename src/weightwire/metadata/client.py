"""The metadata server over the network: every call bounded, one error where it does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from weightwire.auth import Secret
from weightwire.metadata.endpoints import check_endpoint, split
from weightwire.metadata.keeper import Keeper
from weightwire.wire.messages import (
    FindReplicas,
    FindShard,
    KeepBeat,
    Lease,
    PublicationRecord,
    ReplicaListing,
    ShardListing,
    Withdrawal,
)
from weightwire.wire.metadata_client import KeepCall, MetadataStub
from weightwire.wire.reports import PeerFailure, ReportAnswer, SourceView

__all__ = ["Keeper", "MetadataClient"]

CALL_S = 5.0
"""The bound of a call that names none."""


class MetadataClient:
    """See ``metadata.api.Metadata``. Thread safe; connects on first use; one object a process is enough.

    Args:
        url: ``host:port`` of the server.
        secret: the shared secret.
        timeout: seconds for each call that names no other.

    Raises:
        ConfigError: ``url`` is not ``host:port``.
    """

    def __init__(self, url: str, secret: Secret, *, timeout: float = CALL_S) -> None:
        split(url)
        self.url = url
        self._timeout = timeout
        self._stub = MetadataStub(url, secret)
        self.keeper = Keeper(self)
        """The process's ``Keep`` stream (``metadata.api.Keeping``); its threads start with the first ``add``."""

    def publish(self, record: PublicationRecord, *, timeout: float | None = None) -> Lease:
        """See ``Metadata.publish``."""
        return self._stub.publish(record, timeout or self._timeout)

    def check_endpoint(self, endpoint: str, *, timeout: float | None = None) -> None:
        """Refuse to advertise what others cannot reach; see ``endpoints.check_endpoint``."""
        check_endpoint(endpoint, self.url, timeout=timeout or self._timeout)

    def withdraw(self, withdrawal: Withdrawal, *, timeout: float | None = None) -> None:
        """See ``Metadata.withdraw``."""
        self._stub.withdraw(withdrawal, timeout or self._timeout)

    def find_replicas(self, query: FindReplicas, *, timeout: float | None = None) -> ReplicaListing:
        """See ``Metadata.find_replicas``."""
        return self._stub.find_replicas(query, timeout or self._timeout)

    def find_shard(self, query: FindShard, *, timeout: float | None = None) -> ShardListing:
        """See ``Metadata.find_shard``."""
        return self._stub.find_shard(query, timeout or self._timeout)

    def report(self, failure: PeerFailure, *, timeout: float | None = None) -> ReportAnswer:
        """See ``Metadata.report``."""
        return self._stub.report(failure, timeout or self._timeout)

    def sources(self, model_id: str = "", *, timeout: float | None = None) -> list[SourceView]:
        """See ``Metadata.sources``."""
        return self._stub.sources(model_id, timeout or self._timeout)

    def decide(self, key: str, value: bytes | None, wait_s: float, *, timeout: float | None = None) -> bytes | None:
        """See ``Metadata.decide``; without ``timeout`` the call is bounded by ``wait_s`` and the client's own bound."""
        bound = wait_s + self._timeout if timeout is None else timeout
        return self._stub.decide(key, value, wait_s, bound).value

    def keep(self, beats: Iterator[KeepBeat], *, timeout: float) -> KeepCall:
        """Open a ``Keep`` stream; one a process is enough, and ``Keeper`` drives it.

        Args:
            beats: drawn from by a thread of gRPC's; decides the rhythm.
            timeout: seconds for opening it.
        """
        return self._stub.keep(beats, timeout)

    def close(self) -> None:
        """End the ``Keep`` stream (its leases become suspect, then end) and all calls; idempotent."""
        self.keeper.close()
        self._stub.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
