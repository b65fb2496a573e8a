"""What serves one registration: an agent of its own, and a thread that drives it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from weightwire.errors import TransferError
from weightwire.manifest.address import Region
from weightwire.transport.nixl.agent import Agent
from weightwire.transport.nixl.lanes import tcp_is_the_only_network

_IDLE_NAP_S = 0.001
_BUSY = 4
"""A look at the agent that takes so many times longer than the quickest one moved something."""
_AWAKE_S = 0.002
"""How long after the last movement it does not nap."""

_log = logging.getLogger(__name__)


class Server:
    """Serves ``regions`` until ``end``.

    Ending an agent revokes its keys, so readers over RDMA are cut off. Not so over TCP, which UCX emulates with answers
    that the source sends: to end an agent that has an answer half sent may crash the process, in ``ucp_worker_destroy``
    of the UCX 1.23 of NIXL 1.5.1 (7 of 412 times with a reader in mid-read). So where TCP is the only
    network, the agent has no thread of NIXL's but one of ours; ``end`` stops that, and parks the agent for as long as
    the process lives: nobody drives it, so not a byte is read any more. It costs 1 MiB, 8 open files, and one a reader.

    Args:
        agent: nobody else has it; it has a progress thread of NIXL's unless TCP is the only network. Ended here.
        regions: what is readable.

    Raises:
        TransferError: NIXL cannot use one of them; names the device.
    """

    def __init__(self, agent: Agent, regions: Sequence[Region]) -> None:
        self.name = agent.name
        self.parks = tcp_is_the_only_network()
        self._agent = agent
        self._stop = threading.Event()
        self._driver: threading.Thread | None = None
        try:
            self._agent.register(regions)
            self.metadata = self._agent.metadata()
        except TransferError:
            self._agent.destroy()
            raise
        if self.parks:
            self._driver = threading.Thread(target=self._drive, name=f"nixl-serve-{self.name}", daemon=True)
            self._driver.start()

    def end(self) -> None:
        """Serve nobody any more. Call it once; may take long, if the library does not come back.

        Raises:
            TransferError: something still refers to the agent (a bug).
        """
        if self._driver is None:
            self._agent.destroy()
            return
        self._stop.set()
        self._driver.join()
        self._agent.park()

    def _drive(self) -> None:
        moved, quickest = 0.0, float("inf")
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._agent.progress()
            except TransferError as error:
                _log.warning("%s serves no more: %s", self.name, error)
                return
            now = time.monotonic()
            quickest = min(quickest, now - began)
            if now - began > _BUSY * quickest:
                moved = now
            time.sleep(0 if now - moved < _AWAKE_S else _IDLE_NAP_S)
