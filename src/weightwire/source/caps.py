"""What one process gives its readers at most: bytes a second and readers at a time, whatever it publishes to whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from weightwire.errors import SourceBusy
from weightwire.observability.metrics import SERVED, Metrics, process_metrics
from weightwire.source.leases import ReadLease
from weightwire.transport.base import Transport, source_paces
from weightwire.transport.pacing import Pacer


@dataclass(frozen=True, slots=True)
class Split:
    """A rate, parted among readers.

    Attributes:
        each: bytes a second for each reader; 0 for no bound.
        streamed: bytes a second for all readers together whose reads the source itself paces; likewise.
    """

    each: float
    streamed: float


def split(max_rate: float, one_sided: int, streamed: int) -> Split:
    """Equal parts for all readers, so that the sum is ``max_rate``. Pure.

    Args:
        max_rate: bytes a second; 0 for no bound.
        one_sided: readers that pace themselves by what they are granted.
        streamed: readers that the source paces.
    """
    each = max_rate / max(1, one_sided + streamed)
    return Split(each, each * streamed if streamed and one_sided else max_rate)


@dataclass(kw_only=True)
class Caps:
    """The caps of one process, and what keeps to them.

    Attributes:
        max_rate: bytes a second, all readers together; 0 for no bound.
        max_readers: processes that may read at a time; 0 for no bound.
        metrics: of the process.
        pacer: for the transports that the source paces (``SOURCE_PACES``).
    """

    max_rate: float = 0.0
    max_readers: int = 0
    metrics: Metrics = field(default_factory=process_metrics)
    pacer: Pacer = field(init=False)

    def __post_init__(self) -> None:
        self.pacer = Pacer(self.max_rate, waited=lambda seconds: self.metrics.paced(SERVED, seconds))
        self.metrics.cap(self.max_rate)

    def check(self, reader: str, leases: Iterable[ReadLease]) -> None:
        """Whether ``reader`` may have a lease besides ``leases``, which are all that are open in this process.

        Raises:
            SourceBusy: as many others as may are reading.
        """
        if not self.max_readers:
            return
        others = {lease.reader for lease in leases} - {reader}
        if len(others) >= self.max_readers:
            raise SourceBusy(
                f"the source serves {len(others)} readers, as many as it takes", "wait, or use another source"
            )

    def part(self, leases: Iterable[ReadLease], transports: Mapping[str, Transport]) -> float:
        """Part ``max_rate`` among ``leases``, all that are open in this process; what each reader may have now.

        A lease counts as one-sided until a transport that the source paces has seen a read under it.

        Args:
            leases: open now.
            transports: of the process, by name.
        """
        if not self.max_rate:
            return 0.0
        paced = {name for name, transport in transports.items() if source_paces(transport)}
        kinds = [lease.seen in paced or paced.issuperset(lease.transports) for lease in leases]
        parts = split(self.max_rate, kinds.count(False), kinds.count(True))
        self.pacer.rate = parts.streamed
        return parts.each
