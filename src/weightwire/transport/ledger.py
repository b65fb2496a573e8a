"""Who is at a registration's memory right now, so that it can be withdrawn: used by the backends that serve by hand."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weightwire.errors import FenceTimeout, GenerationMoved
from weightwire.manifest.address import AddressSpace
from weightwire.transport.base import Registration

CUT_GRACE_S = 5.0
"""How long a reader that was cut off may take to leave the memory; a system call's worth in practice."""

Cut = Callable[[], None]
"""Ends one use from outside: returns at once, after which the use ends by itself."""

_log = logging.getLogger(__name__)


class HeldMemory:
    """A registration of a backend that needs no more than to know it; compares by identity."""

    def __init__(self, memory: AddressSpace) -> None:
        self._memory = memory

    @property
    def memory(self) -> AddressSpace:
        """The registered memory, kept alive by this object."""
        return self._memory


class Ledger:
    """Registrations that are live, and the uses of each that are under way. Safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._live: set[Registration] = set()
        self._uses: dict[Registration, list[Cut]] = {}

    def add(self, memory: AddressSpace) -> HeldMemory:
        """Make ``memory`` a live registration."""
        held = HeldMemory(memory)
        with self._changed:
            self._live.add(held)
        return held

    def live(self, registration: Registration) -> bool:
        """Whether ``registration`` was added here and not drained since."""
        with self._changed:
            return registration in self._live

    def live_registrations(self) -> list[Registration]:
        """All that were added and not drained since."""
        with self._changed:
            return list(self._live)

    @contextmanager
    def use(self, registration: Registration, cut: Cut) -> Iterator[None]:
        """Touch the memory of ``registration`` inside this block, and only there.

        Raises:
            GenerationMoved: it is not live (any more).
        """
        with self._changed:
            if registration not in self._live:
                raise GenerationMoved("the memory was withdrawn", "open a new read")
            self._uses.setdefault(registration, []).append(cut)
        try:
            yield
        finally:
            with self._changed:
                self._uses[registration].remove(cut)
                if not self._uses[registration]:
                    del self._uses[registration]
                self._changed.notify_all()

    def drain(self, registration: Registration, deadline: float) -> None:
        """No new use from now on; return when none is under way. Those still there at ``deadline`` are cut.

        Raises:
            FenceTimeout: a use did not end although it was cut; the memory must neither be changed nor freed.
        """
        with self._changed:
            self._live.discard(registration)
            if self._idle(registration, deadline - time.monotonic()):
                return
            cuts = list(self._uses[registration])
            _log.warning("cutting off %d readers that are still at withdrawn memory", len(cuts))
            for cut in cuts:
                cut()
            if not self._idle(registration, CUT_GRACE_S):
                raise FenceTimeout(
                    "a reader could not be cut off from withdrawn memory", "keep that memory alive and unchanged"
                )

    def _idle(self, registration: Registration, timeout: float) -> bool:
        return self._changed.wait_for(lambda: registration not in self._uses, max(timeout, 0.0))
