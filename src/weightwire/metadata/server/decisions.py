"""Write-once values with a wait, for the ``Decide`` RPC: one event loop, bounded, forgetful."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from weightwire.errors import MetadataError

MAX_DECISIONS = 65_536
MAX_BYTES = 256 * 1024 * 1024
"""Of all values together."""
KEPT_S = 3600.0
"""Longer than any replica takes to start."""


class Decisions:
    """Values by key; the first one written stays.

    Args:
        clock: seconds, monotonic.
        kept_s: how long a value is remembered.
        limit: values at a time.
    """

    def __init__(self, clock: Callable[[], float], kept_s: float = KEPT_S, limit: int = MAX_DECISIONS) -> None:
        self._clock = clock
        self._kept_s = kept_s
        self._limit = limit
        self._bytes = 0
        self._values: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._waiters: dict[str, set[asyncio.Future[bytes]]] = {}

    async def decide(self, key: str, value: bytes | None, wait_s: float) -> bytes | None:
        """See ``MetadataService.decide``."""
        self._forget()
        found = self._values.get(key)
        if found is not None:
            return found[1]
        if value is not None:
            return self._set(key, value)
        return await self._wait(key, wait_s)

    def _set(self, key: str, value: bytes) -> bytes:
        if len(self._values) >= self._limit or self._bytes + len(value) > MAX_BYTES:
            raise MetadataError(f"the metadata server holds {len(self._values)} decisions", "wait, or run another")
        self._bytes += len(value)
        self._values[key] = (self._clock(), value)
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(value)
        return value

    async def _wait(self, key: str, wait_s: float) -> bytes | None:
        if wait_s <= 0:
            return None
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, set()).add(waiter)
        try:
            return await asyncio.wait_for(waiter, wait_s)
        except TimeoutError:
            return None
        finally:
            left = self._waiters.get(key)
            if left is not None:
                left.discard(waiter)
                if not left:
                    del self._waiters[key]

    def _forget(self) -> None:
        limit = self._clock() - self._kept_s
        while self._values and next(iter(self._values.values()))[0] < limit:
            self._bytes -= len(self._values.popitem(last=False)[1][1])
