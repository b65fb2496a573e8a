"""A target as a relay, as the target sees it: what it receives can be passed on meanwhile by whoever serves here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from weightwire.manifest.address import AddressSpace
from weightwire.manifest.availability import Availability
from weightwire.target.offer import Offer
from weightwire.transport.base import Registration


class Relay(Protocol):
    """Passes on one load's leaves, as they are verified. Each call is bounded."""

    def begin(self, offer: Offer, memory: AddressSpace, available: Availability) -> Mapping[str, Registration]:
        """Serve from now on what is in ``available``.

        Legal once all ranks agreed on ``offer``, before the first byte.

        Args:
            offer: what is being received.
            memory: where; stays registered until ``end``, or as long as what is published of it.
            available: the leaves that are there; grows.

        Returns:
            What to read into, by transport; empty where nothing is passed on.
        """
        ...

    def end(self) -> None:
        """Serve nothing any more: once it returns, the memory may be filled with something else. Idempotent."""
        ...

    @property
    def broken(self) -> bool:
        """Whether a leaf was found changed after it had been verified: what was received must not be used."""
        ...


class NoRelay:
    """Nothing is passed on."""

    broken = False

    def begin(self, offer: Offer, memory: AddressSpace, available: Availability) -> Mapping[str, Registration]:  # noqa: ARG002  (the protocol's)
        """Nothing."""
        return {}

    def end(self) -> None:
        """Do nothing."""
