"""Work that may hang in a library, done once in a thread of its own and waited for with a bound."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from weightwire.errors import FenceTimeout, TransferError

_log = logging.getLogger(__name__)


class Bounded:
    """``work``, done at most once however many threads ask for it.

    Args:
        name: of the thread.
        work: may raise TransferError.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        self._work: Callable[[], None] | None = work
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failed = "it did not end as it should"
        self._done = threading.Event()

    def run(self, deadline: float, late: FenceTimeout) -> None:
        """Return once the work is done.

        Raises:
            FenceTimeout: ``late`` if it is not done by ``deadline`` (it goes on), or it failed.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._do, name=self._name, daemon=True)
                self._begin(self._thread)
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            raise late
        if self._failed:
            raise FenceTimeout(self._failed, late.remedy)

    def _begin(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down and starts no threads any more
            self._do()

    def _do(self) -> None:
        work, self._work = self._work, None
        assert work is not None
        try:
            work()
            self._failed = ""
        except TransferError as error:
            _log.warning("%s: %s", self._name, error)
            self._failed = error.problem
        finally:
            self._done.set()
