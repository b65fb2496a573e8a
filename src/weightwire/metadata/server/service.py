"""The registry as a ``MetadataService``: events for the observer, a store that blocks kept off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from weightwire.metadata.registry import Registry
from weightwire.metadata.server.decisions import Decisions
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
from weightwire.wire.reports import (
    Decision,
    PeerFailure,
    ReportAnswer,
    SourceView,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Observer(Protocol):
    """Told of everything that a metric might count. Must be quick and must not raise."""

    def called(self, rpc: str) -> None:
        """One RPC was answered."""
        ...

    def leases(self, count: int) -> None:
        """How many leases live now (after every sweep and publish)."""
        ...


class Service:
    """See ``MetadataService``.

    Args:
        registry: what is known.
        decisions: the write-once values.
        blocking: the registry's store waits for something: call it from threads.
        observer: see :class:`Observer`.
    """

    def __init__(
        self, registry: Registry, decisions: Decisions, *, blocking: bool = False, observer: Observer | None = None
    ) -> None:
        self._registry = registry
        self._decisions = decisions
        self._blocking = blocking
        self._observer = observer
        self._lock = asyncio.Lock()

    async def publish(self, record: PublicationRecord) -> Lease:
        """See ``MetadataService.publish``."""
        lease = await self._call("Publish", lambda: self._registry.publish(record))
        await self._count()
        return lease

    async def keep(self, stream: str, beat: KeepBeat) -> KeepAnswer:
        """See ``MetadataService.keep``."""
        return await self._call("Keep", lambda: self._registry.keep(stream, beat))

    async def keep_ended(self, stream: str) -> None:
        """See ``MetadataService.keep_ended``."""
        suspects = await self._call("KeepEnded", lambda: self._registry.keep_ended(stream))
        if suspects:
            logger.info("a keep stream ended: %d leases are suspect", suspects)

    async def withdraw(self, withdrawal: Withdrawal) -> None:
        """See ``MetadataService.withdraw``."""
        await self._call("Withdraw", lambda: self._registry.withdraw(withdrawal))

    async def find_replicas(self, query: FindReplicas) -> ReplicaListing:
        """See ``MetadataService.find_replicas``."""
        return await self._call("FindReplicas", lambda: self._registry.find_replicas(query))

    async def find_shard(self, query: FindShard) -> ShardListing:
        """See ``MetadataService.find_shard``."""
        return await self._call("FindShard", lambda: self._registry.find_shard(query))

    async def report(self, failure: PeerFailure, observed_host: str) -> ReportAnswer:
        """See ``MetadataService.report``."""
        return await self._call("Report", lambda: self._registry.report(failure, observed_host))

    async def sources(self, model_id: str) -> list[SourceView]:
        """See ``MetadataService.sources``."""
        return await self._call("Sources", lambda: self._registry.sources(model_id))

    async def decide(self, key: str, value: bytes | None, wait_s: float) -> Decision:
        """See ``MetadataService.decide``."""
        return Decision(key=key, value=await self._decisions.decide(key, value, wait_s))

    async def sweep(self) -> None:
        """Forget what has expired."""
        await self._call("Sweep", self._registry.sweep)
        await self._count()

    async def _count(self) -> None:
        if self._observer is not None:
            self._observer.leases(len(await self._run(self._registry.live)))

    async def _call(self, rpc: str, function: Callable[[], Result]) -> Result:
        result = await self._run(function)
        if self._observer is not None:
            self._observer.called(rpc)
        return result

    async def _run(self, function: Callable[[], Result]) -> Result:
        if not self._blocking:
            return function()
        async with self._lock:  # the registry takes one caller at a time
            return await asyncio.to_thread(function)
