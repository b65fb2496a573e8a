"""How much a publication is trusted at the moment: suspect, reported, quarantined. Pure.

One reporter only lowers the rank and makes the source digest the leaf again. Quarantine needs a failed self-check, or
reports of wrong bytes from two hosts. A host that accuses sources on several machines most likely has a fault of its
own, and its word does not count towards a quarantine (hazards H54, H69).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from weightwire.metadata.slots import Slot


@dataclass(frozen=True, slots=True)
class Standing:
    """What speaks against one publication.

    Attributes:
        suspect: nobody keeps it at the moment; confirm by contact.
        reports: that have not expired.
        quarantine: why it must not be chosen; "" if it may.
    """

    suspect: bool
    reports: int
    quarantine: str

    @property
    def good(self) -> bool:
        """Nothing speaks against it."""
        return not (self.suspect or self.reports or self.quarantine)


def unreliable_hosts(slots: Iterable[Slot]) -> frozenset[str]:
    """Hosts that report wrong bytes from sources on two machines or more."""
    accused: defaultdict[str, set[str]] = defaultdict(set)
    for slot in slots:
        for blame in slot.blames:
            if blame.kind.blames_bytes:
                accused[blame.host].add(_machine(slot))
    return frozenset(host for host, machines in accused.items() if len(machines) > 1)


def standing(slot: Slot, unreliable: frozenset[str]) -> Standing:
    """Of one live slot, without expired reports."""
    hosts = {blame.host for blame in slot.blames if blame.kind.blames_bytes} - unreliable
    reason = ""
    if slot.superseded:
        reason = "its endpoint belongs to a later process now"
    elif slot.check_failed:
        reason = "it found its own bytes changed"
    elif len(hosts) > 1:
        reason = f"{len(hosts)} hosts received wrong bytes from it"
    return Standing(slot.suspect, len(slot.blames), reason)


def _machine(slot: Slot) -> str:
    return slot.record.host if slot.record is not None and slot.record.host else slot.incarnation
