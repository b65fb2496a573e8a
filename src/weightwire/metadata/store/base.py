"""The one seam between the registry and where its slots are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from weightwire.metadata.slots import Key, Slot

Result = TypeVar("Result")
Change = Callable[[Slot | None], tuple[Slot | None, Result]]
"""From the slot as it is to the slot as it shall be (None: none), and an answer. Pure: it may be called again."""


class Store(Protocol):
    """Slots by key, changed atomically one at a time."""

    @property
    def blocking(self) -> bool:
        """Whether calls wait for something outside the process, so that an event loop must not make them itself."""
        ...

    def update(self, key: Key, change: Change[Result]) -> Result:
        """Apply ``change`` to the slot under ``key`` as one step: no other update of it comes between.

        An exception from ``change`` leaves the slot as it was.

        Raises:
            MetadataError: the store is full.
        """
        ...

    def key_of(self, lease_id: str) -> Key | None:
        """The key of the slot that has this lease id."""
        ...

    def slots(self) -> list[Slot]:
        """All slots, expired ones and tombstones too; a snapshot."""
        ...
