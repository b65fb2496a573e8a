"""Slots in this process: the embedded default. What it holds is made again by the sources after a restart."""

from __future__ import annotations

import threading

from weightwire.errors import MetadataError
from weightwire.metadata.slots import Key, Slot
from weightwire.metadata.store.base import Change, Result

MAX_SLOTS = 200_000


class MemoryStore:
    """See ``Store``. Thread safe.

    Args:
        max_slots: publications and tombstones together.
    """

    blocking = False

    def __init__(self, max_slots: int = MAX_SLOTS) -> None:
        self._slots: dict[Key, Slot] = {}
        self._leases: dict[str, Key] = {}
        self._max = max_slots
        self._lock = threading.Lock()

    def update(self, key: Key, change: Change[Result]) -> Result:
        """See ``Store.update``."""
        with self._lock:
            before = self._slots.get(key)
            after, result = change(before)
            if before is None and after is not None and len(self._slots) >= self._max:
                raise MetadataError(f"the metadata server holds {self._max} records", "withdraw some, or run another")
            self._put(key, before, after)
            return result

    def key_of(self, lease_id: str) -> Key | None:
        """See ``Store.key_of``."""
        return self._leases.get(lease_id)

    def slots(self) -> list[Slot]:
        """See ``Store.slots``."""
        with self._lock:
            return list(self._slots.values())

    def _put(self, key: Key, before: Slot | None, after: Slot | None) -> None:
        if before is not None and (after is None or after.lease_id != before.lease_id):
            self._leases.pop(before.lease_id, None)
        if after is None:
            self._slots.pop(key, None)
            return
        self._slots[key] = after
        if after.lease_id:
            self._leases[after.lease_id] = key
