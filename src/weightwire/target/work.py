"""The schedule of one load, shared by the threads that drive its lanes: a lock, the clock, and the bounce buffers."""

from __future__ import annotations

import threading
import time

from weightwire.manifest.address import AddressSpace
from weightwire.target.bounce import Bounce
from weightwire.target.schedule import Flight, Lane, Next, Schedule
from weightwire.target.shares import Share
from weightwire.transport.memory import HOST


class Work:
    """Thread-safe. Waits are bounded by the caller.

    Args:
        schedule: owned from now on.
        memory: of the whole shard, into which bounce buffers are copied.
    """

    def __init__(self, schedule: Schedule, memory: AddressSpace) -> None:
        if memory.devices() - {HOST}:  # what a device sends to host memory goes another, slower way
            schedule.bounce = 0
        self._schedule = schedule
        self._memory = memory
        self._lock = threading.Lock()
        self._news: list[threading.Condition] = []  # by peer: a lane that can do nothing with it need not wake
        self._landed: dict[Flight, Bounce] = {}

    @property
    def finished(self) -> bool:
        """Whether everything is verified and in place."""
        with self._lock:
            return self._schedule.finished

    @property
    def unverified(self) -> int:
        """See ``Schedule.unverified``."""
        with self._lock:
            return self._schedule.unverified

    @property
    def extent(self) -> range:
        """See ``Schedule.extent``."""
        return self._schedule.extent

    @property
    def retries(self) -> int:
        """See ``Schedule``."""
        return self._schedule.retries

    @property
    def duplicated(self) -> int:
        """See ``Schedule``."""
        return self._schedule.duplicated

    def __len__(self) -> int:
        """About how many reads nobody was asked for."""
        with self._lock:
            return self._schedule.chunks

    def join(self, lanes: int, have: int | None, share: Share) -> int:
        """See ``Schedule.join``."""
        with self._lock:
            self._news.append(threading.Condition(self._lock))
            return self._schedule.join(lanes, time.monotonic(), have, share)

    def offers(self, peer: int, leaves: int) -> None:
        """See ``Schedule.offers``; wakes those that had nothing to ask it for."""
        with self._lock:
            self._schedule.offers(peer, leaves)
            self._news[peer].notify_all()

    def drop(self, peer: int) -> None:
        """See ``Schedule.drop``."""
        with self._lock:
            self._schedule.drop(peer)

    def may_claim(self, peer: int) -> bool:
        """See ``Schedule.may_claim``."""
        with self._lock:
            return self._schedule.may_claim(peer)

    def claim(self, lane: Lane, most: int = 0) -> Flight | None:
        """See ``Schedule.claim``."""
        with self._lock:
            return self._schedule.claim(lane, time.monotonic(), most)

    def overdue(self, lane: Lane) -> tuple[Lane, ...]:
        """Lanes to fence; see ``Schedule.overdue``."""
        with self._lock:
            return self._schedule.overdue(lane, time.monotonic()).fence

    def arrived(self, flight: Flight, bounce: Bounce | None) -> tuple[tuple[Flight, ...], tuple[Lane, ...]]:
        """``flight`` is verified, in place or in its bounce buffer.

        Returns:
            What is in place and counts from now on, and lanes to fence.
        """
        with self._lock:
            if bounce is not None:
                self._landed[flight] = bounce
            todo = self._schedule.arrived(flight, time.monotonic())
            if self._schedule.chunks:
                self._news[flight.lane.peer].notify_all()
            else:  # the end game, or the end
                self._wake()
        copied = self._carry_out(todo)
        return (flight,) if bounce is None else copied, todo.fence

    def refused(self, flight: Flight) -> tuple[Flight, ...]:
        """``flight``'s peer does not have it yet. What counts from now on, as for ``released``."""
        with self._lock:
            todo = self._schedule.refused(flight)
            self._wake()
        return self._carry_out(todo)

    def released(self, lane: Lane) -> tuple[Flight, ...]:
        """``lane`` is finished or fenced. What counts from now on, because it could be copied into place."""
        with self._lock:
            todo = self._schedule.released(lane)
            self._wake()
        return self._carry_out(todo)

    def wait(self, peer: int, timeout: float) -> bool:
        """Wait until something came that may concern ``peer``'s lanes; true if everything is verified."""
        with self._lock:
            if not self._schedule.finished:
                self._news[peer].wait(timeout)
            return self._schedule.finished

    def _wake(self) -> None:
        for news in self._news:
            news.notify_all()

    def _carry_out(self, todo: Next) -> tuple[Flight, ...]:
        """Copies outside of the lock: nobody else touches those leaves."""
        for flight in todo.drop:
            self._landed.pop(flight, None)
        for flight in todo.copy:
            self._landed.pop(flight).copy_to(self._memory)
            with self._lock:
                self._schedule.copied(flight)
                self._wake()
        return todo.copy
