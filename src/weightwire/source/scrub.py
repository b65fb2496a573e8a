"""The slow scrub: what a source offers is digested again, leaf after leaf, for as long as it offers it.

Engines can change published bytes without telling us (a reload that copies in place), and a reader over ``nixl`` could
write. Only what is *offered* is scrubbed: before, an engine may capture graphs, which work of another thread on the
device would break; while paused, bytes may change. ``Rounds`` (which leaf) and ``Pace`` (when) are pure.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from weightwire.errors import WeightwireError
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.digest import digest_span
from weightwire.manifest.records import Layout
from weightwire.types import Span

log = logging.getLogger(__name__)

BROKEN_S = 60.0
"""After an error that nobody foresaw."""
SHOWN = 3
"""Names of a leaf's tensors that a log line gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast leaves follow each other: never faster than any of these allows.

    Attributes:
        rate: bytes a second. 32 MiB is half a percent of a core (a leaf of 1 MiB takes about 0.17 ms); at it, 16 GiB
            take nine minutes.
        share: of one core, by the CPU time that a leaf took, where digesting is dearer than that.
        pass_s: one pass over everything takes at least so long; small shards need no more.
        idle_s: between two looks while nothing is offered.
    """

    rate: float = 32 * 2**20
    share: float = 0.01
    pass_s: float = 30.0
    idle_s: float = 1.0

    def rest(self, nbytes: int, total: int, took: float) -> float:
        """Seconds to let pass after a leaf.

        Args:
            nbytes: of the leaf.
            total: bytes of everything that is offered, at least ``nbytes``.
            took: CPU seconds that digesting it took.
        """
        return max(nbytes / self.rate, self.pass_s * nbytes / total, took * (1 / self.share - 1))


class Rounds:
    """Which leaf is next: one publication after the other, each from its first leaf to its last. Pure."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}  # in the order in which publications are visited

    def take(self, leaves: Mapping[str, int]) -> tuple[str, int] | None:
        """The next leaf, or ``None`` if nothing is offered.

        Args:
            leaves: of every publication, how many it offers now. One that offers none keeps its place for when it
                does again; one that is missing has ended and is forgotten.
        """
        known = {key: leaf for key, leaf in self._next.items() if key in leaves}
        self._next = known | {key: 0 for key in leaves if key not in known}
        key = next(filter(leaves.get, self._next), None)
        if key is None:
            return None
        leaf = self._next[key] % leaves[key]
        if leaf + 1 == leaves[key]:
            del self._next[key]  # done: to the end of the queue
        self._next[key] = (leaf + 1) % leaves[key]
        return key, leaf


class Offered(Protocol):
    """A publication as the scrub sees it (``source.publication.Publication``)."""

    @property
    def offered(self) -> Layout | None:
        """Of the bytes that may be read now; ``None`` while nobody may, since they may change then."""
        ...

    def recheck(self, leaf: int) -> bool:
        """Digest one leaf again; withdraws at the first difference. Raises ``GenerationMoved`` once not offered."""
        ...


@dataclass(kw_only=True)
class Scrub:
    """Used by one thread.

    Attributes:
        publications: gives everything that is published now, by a key that stays with it.
        pace: see :class:`Pace`.
        cpu: CPU seconds of the calling thread.
    """

    publications: Callable[[], Mapping[str, Offered]]
    pace: Pace = field(default_factory=Pace)
    cpu: Callable[[], float] = time.thread_time
    _rounds: Rounds = field(default_factory=Rounds)

    def step(self) -> float:
        """Digest one leaf; seconds to let pass before the next one."""
        found = self.publications()
        layouts = {key: publication.offered for key, publication in found.items()}
        chosen = self._rounds.take({key: len(layout.leaves) if layout else 0 for key, layout in layouts.items()})
        layout = layouts[chosen[0]] if chosen else None
        if chosen is None or layout is None:
            return self.pace.idle_s
        key, leaf = chosen
        before = self.cpu()
        with contextlib.suppress(WeightwireError):  # it was paused or withdrawn in this very moment
            found[key].recheck(leaf)
        total = sum(each.nbytes for each in layouts.values() if each)
        return self.pace.rest(layout.leaves[leaf].span.nbytes, total, self.cpu() - before)

    def run(self, stop: threading.Event) -> None:
        """Go on until ``stop``: the body of the thread."""
        rest = self.pace.idle_s
        while not stop.wait(rest):
            try:
                rest = self.step()
            except Exception:  # the thread's edge: a bug here must not end the scrub without a word
                log.exception("the scrub met a bug; trying again in %.0f s", BROKEN_S)
                rest = BROKEN_S


def digest_aside(memory: AddressSpace, span: Span) -> bytes:
    """As ``manifest.digest.digest_span``, of a leaf that nothing is about to write.

    On a device it runs beside what is queued there: bytes that are offered were written long ago, so there is nothing
    to wait for, and behind a busy engine's work a leaf would take as long as a step of the engine.
    """
    with contextlib.ExitStack() as aside:
        for device in memory.devices(span) - {"cpu"}:
            # first the device: to leave a stream of another one than the thread's makes a context on the thread's
            aside.enter_context(torch.cuda.device(device))
            aside.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))  # type: ignore[no-untyped-call]
        return digest_span(memory, span)


def tensors_of(layout: Layout, leaf: int) -> str:
    """The entries that lie in ``leaf``, for people: names, the first few of many."""
    span, names, offset = layout.leaves[leaf].span, [], 0
    for entry in layout.entries:
        if entry.nbytes and offset < span.end and offset + entry.nbytes > span.offset:
            names.append(entry.name)
        offset += entry.nbytes
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
