"""The next agent of a transport, made ahead while whoever opened the transport finds out what to read or digests it."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable

from weightwire.errors import WeightwireError
from weightwire.transport.nixl.agent import Agent

EXIT_S = 5.0
"""How long an exit waits for an agent that is being made: in the middle of it, it could crash."""

_log = logging.getLogger(__name__)


class SpareAgent:
    """One agent, made in a thread of its own; then whoever wants more makes them.

    The first agent of a process takes a second or more where there is a GPU, every other one some 20 ms.

    Args:
        name: gives a name for an agent that nobody had before; asked in several threads.
        serves: see ``Agent``.
    """

    def __init__(self, name: Callable[[], str], *, serves: bool) -> None:
        self._name = name
        self._serves = serves
        self._lock = threading.Lock()
        self._agent: Agent | None = None
        self._wanted = True
        self._thread = threading.Thread(target=self._make, name="nixl-spare", daemon=True)
        atexit.register(self._thread.join, EXIT_S)
        self._thread.start()

    def take(self) -> Agent:
        """The spare agent, waiting until it is made, or a new one where it was taken before or could not be made.

        Raises:
            TransferError: UCX finds nothing to work with.
        """
        self._thread.join()
        with self._lock:
            agent, self._agent = self._agent, None
        return agent or Agent(self._name(), serves=self._serves)

    def close(self) -> None:
        """End the spare agent if nobody took it; idempotent. One that is still being made ends once it is made."""
        with self._lock:
            agent, self._agent, self._wanted = self._agent, None, False
        if agent is not None:
            agent.destroy()

    def _make(self) -> None:
        try:
            agent = Agent(self._name(), serves=self._serves)
        except WeightwireError as error:
            _log.debug("no spare agent: %s", error)  # whoever needs one is told
            return
        finally:
            atexit.unregister(self._thread.join)
        with self._lock:
            if self._wanted:
                self._agent = agent
                return
        agent.destroy()
