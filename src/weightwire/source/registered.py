"""One shard's memory, registered with every transport that can serve it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from weightwire.errors import PublishError, TransferError
from weightwire.manifest.address import AddressSpace
from weightwire.source.leases import ReadLease
from weightwire.transport.base import Registration, Transport, sees_reads

log = logging.getLogger(__name__)

RELEASE_S = 1.0
"""What each transport gets at least to let go of the memory."""


class Registered:
    """Empty at first. Not thread-safe: its publication's lock guards it.

    Attributes:
        by_name: transport name -> registration.
        failed: transport name -> why it could not register the memory.
    """

    def __init__(self, transports: Mapping[str, Transport]) -> None:
        self._transports = transports
        self.by_name: dict[str, Registration] = {}
        self.failed: dict[str, str] = {}

    def register(self, memory: AddressSpace) -> None:
        """With every transport that can.

        Raises:
            PublishError: none can.
        """
        self.by_name, self.failed = {}, {}
        for name, transport in self._transports.items():
            try:
                self.by_name[name] = transport.register(memory)
            except TransferError as error:
                self.failed[name] = error.problem
                log.warning("%s cannot serve this memory: %s", name, error)
        if not self.by_name:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.failed.items()) or "none is set up"
            raise PublishError(f"no transport can serve this memory ({reasons})", "see: weightwire doctor")

    def release(self, until: float) -> None:
        """Readers are cut off where the transport can do so; the memory is nobody's but its owner's then."""
        for name, registration in self.by_name.items():
            self._transports[name].deregister(registration, max(until, time.monotonic() + RELEASE_S))
        self.by_name = {}

    def writable(self, lease: ReadLease) -> bool:
        """Whether its holder could write to the memory unseen: it reaches it one-sided."""
        return not all(sees_reads(self._transports[name]) for name in lease.transports)

    def endpoints(self, lease: ReadLease) -> dict[str, bytes]:
        """What a reader needs, by transport."""
        return {name: self._transports[name].describe(self.by_name[name], lease.token) for name in lease.transports}
