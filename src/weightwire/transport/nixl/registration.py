"""Memory that the nixl backend serves from or reads into."""

from __future__ import annotations

from collections.abc import Sequence

from weightwire.manifest.address import AddressSpace, Region
from weightwire.transport.nixl.bounded import Bounded
from weightwire.transport.nixl.server import Server


class NixlRegistration:
    """Memory of this transport; compares by identity.

    Where the transport serves, it is registered with a serving agent of its own: ending that agent withdraws this
    registration and nothing else, and no key outlives it (nor is any found again by an address).

    Args:
        memory: what it is of.
        regions: what is registered with NIXL for it, see ``registrable``.
        server: what serves them, if it serves.
    """

    def __init__(self, memory: AddressSpace, regions: Sequence[Region], server: Server | None) -> None:
        self._memory = memory
        self.regions = regions
        self.server = server
        self.metadata = server.metadata if server else b""
        name = server.name if server else "none"
        self.withdrawal = Bounded(f"nixl-end-{name}", self._end)
        self.live = True

    @property
    def memory(self) -> AddressSpace:
        """The registered memory, kept alive by this object."""
        return self._memory

    def _end(self) -> None:
        if self.server is not None:
            self.server.end()


def registrable(memory: AddressSpace) -> list[Region]:
    """What NIXL is told of: the regions as they are on the host, whole allocations on a device.

    Raises:
        ConfigError: memory in expandable segments.
        TransferError: memory that cannot be registered; names the device.
    """
    on_host = [region for region in memory.regions if region.device == "cpu"]
    on_devices = [region for region in memory.regions if region.device != "cpu"]
    if not on_devices:
        return on_host
    from weightwire.transport import device  # noqa: PLC0415  # torch is imported only where memory is on a device

    return on_host + device.allocations(on_devices)
