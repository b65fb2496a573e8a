"""A shard that a disk is being read into: digests leaf after leaf, beside the loading, and offered to others if wanted.

The loading thread says which tensors are final; a thread of this object's digests the leaves that became final with
them, on another core, and only then makes them available. At the end the digests of all leaves are the manifest, so
nothing is digested after the load.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from weightwire.errors import PublishError
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.availability import Availability
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.finality import Finality
from weightwire.manifest.leafset import mask_of
from weightwire.manifest.provisional import Provisional
from weightwire.manifest.records import DIGEST_BYTES, Layout, Manifest
from weightwire.source.described import from_disk
from weightwire.source.publication import Publication

log = logging.getLogger(__name__)

JOIN_S = 60.0
"""What digesting the leaves that became final last may take: a thousand of them take a second."""

Offer = Callable[[AddressSpace, Provisional, Availability], None]
"""Given memory, digests as they become known, and the leaves that may be read: lets others read those."""

_AGAIN = "say that it is final after its last write, also under its other names; layers declare written_again"


def offered_by(publication: Publication) -> Offer:
    """What ``FromDisk`` offers is ``publication``'s, which is ``LOADING``: others may follow it, before it has ids."""

    def offer(memory: AddressSpace, provisional: Provisional, available: Availability) -> None:
        publication.relay(from_disk(publication.claim, memory, provisional), available)

    return offer


class FromDisk:
    """Begins with the first parameter that is not read yet; ``finish`` or ``abandon`` ends it.

    Args:
        catalogue: of the model whose memory is about to be filled; host memory only.
        offer: called before the first byte; makes what is available from then on readable by others. Without it
            nobody is told anything, and loading may still decide what modules declare beside their tensors.

    Attributes:
        provisional: the digests as they become known.
        availability: the leaves whose digests are known, and which others may read.

    Raises:
        PublishError: the memory is a device's, where "written" does not mean that the bytes are there yet.
        WeightwireError: whatever ``offer`` raises; nothing is offered then.
    """

    def __init__(self, catalogue: Catalogue, offer: Offer | None) -> None:
        if catalogue.memory.devices() - {"cpu"}:
            raise PublishError("device memory cannot be followed while it is filled", "others wait until it is full")
        self.provisional = Provisional(catalogue.layout)
        self.availability = Availability(len(catalogue.layout.leaves))
        self._catalogue = catalogue
        self._finality = Finality(catalogue.layout)
        self._versions: dict[str, int] = {}
        self._queue: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._homes = {name: entry.name for entry in catalogue.layout.entries for name in (entry.name, *entry.aliases)}
        self._offered = offer is not None
        if offer is not None:
            offer(catalogue.memory, self.provisional, self.availability)
        self._thread = threading.Thread(target=self._run, name="weightwire-filling", daemon=True)
        self._thread.start()

    def final(self, names: Collection[str]) -> None:
        """See ``runtime.checkpoint.protocol.Final``; returns at once."""
        for name in names:
            if name in self._homes:
                home = self._homes[name]
                self._versions.setdefault(home, self._version(home))
        self._queue.put(self._finality.final(names))

    def finish(self, loaded: Catalogue) -> Manifest:
        """The manifest of what was loaded, once every leaf is digested. Bounded.

        Args:
            loaded: catalogue of the same model now.

        Raises:
            PublishError: the model has other tensors or other memory now, or a tensor was written after it was final:
                what was offered must be withdrawn.
        """
        self._queue.put(self._finality.rest())
        self._queue.put(None)
        self._thread.join(JOIN_S)
        if self._thread.is_alive() or self._error is not None:
            reason = str(self._error) if self._error else f"it took more than {JOIN_S:.0f} s"
            raise PublishError(f"what was loaded could not be digested: {reason}", "see the log") from self._error
        if not self._same(loaded.layout) or not loaded.memory.lies_as(self._catalogue.memory):
            raise PublishError("the model's tensors were replaced while they were loaded", "fill them in place")
        written = [name for name, version in self._versions.items() if self._version(name) != version]
        if written:
            raise PublishError(f"{written[0]} was written after it was final", _AGAIN)
        return replace(self.provisional.manifest(), layout=loaded.layout)

    def abandon(self) -> None:
        """Stop digesting: the load failed. Bounded, idempotent."""
        self._queue.put(None)
        self._thread.join(JOIN_S)

    def _same(self, layout: Layout) -> bool:
        """Whether the digests are of ``layout``'s leaves, and whoever was told of it was told the same."""
        mine = self._catalogue.layout
        return layout == (mine if self._offered else replace(mine, state=layout.state))

    def _version(self, entry: str) -> int:
        return int(self._catalogue.tensors[entry]._version)  # noqa: SLF001  (counts torch's writes in place)

    def _run(self) -> None:
        try:
            while (leaves := self._queue.get()) is not None:
                for run in _runs(leaves):
                    self._digest(run)
        except Exception as error:  # the thread's edge: told by ``finish``
            log.exception("digesting what was loaded ended")
            self._error = error

    def _digest(self, run: range) -> None:
        layout = self._catalogue.layout
        found = digest_leaves(self._catalogue.memory, layout.leaves[run.start : run.stop])
        assert len(found) == len(run) * DIGEST_BYTES
        self.provisional.tell(run.start, found)  # before anybody may read them
        self.availability.add(mask_of(run))


BATCH = 16
"""Leaves that are digested before they are offered, at most."""


def _runs(leaves: Iterable[int]) -> Iterable[range]:
    """Ascending leaves as runs of neighbours, ``BATCH`` of them at most."""
    run = range(0)
    for leaf in leaves:
        if run and leaf == run.stop and len(run) < BATCH:
            run = range(run.start, leaf + 1)
            continue
        if run:
            yield run
        run = range(leaf, leaf + 1)
    if run:
        yield run
