"""The metadata server as a process, as a coroutine, or embedded in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from weightwire.auth import Secret
from weightwire.errors import ConfigError, WeightwireError
from weightwire.metadata.registry import Registry, Times
from weightwire.metadata.server.decisions import Decisions
from weightwire.metadata.server.service import Observer, Service
from weightwire.metadata.store.base import Store
from weightwire.metadata.store.memory import MemoryStore
from weightwire.wire.listen import join
from weightwire.wire.metadata_service import MetadataListener

logger = logging.getLogger(__name__)

START_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a metadata server is run.

    Attributes:
        secret: the shared secret.
        host: address or name to listen on.
        port: 0 to have one chosen.
        times: durations; the TTL is the one that matters.
        grace_s: running calls get so long at the end.
    """

    secret: Secret
    host: str = "127.0.0.1"
    port: int = 0
    times: Times = field(default_factory=Times)
    grace_s: float = 1.0


class MetadataServer:
    """A metadata server in the running event loop.

    Args:
        settings: see :class:`ServerSettings`.
        store: where records are kept; in memory by default.
        observer: for metrics.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        store: Store | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        store = store or MemoryStore()
        self.registry = Registry(store, clock, settings.times)
        self._service = Service(self.registry, Decisions(clock), blocking=store.blocking, observer=observer)
        self._listener: MetadataListener | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    @property
    def port(self) -> int:
        """The port that it listens on; only once it was started."""
        assert self._listener is not None
        return self._listener.port

    @property
    def address(self) -> str:
        """``host:port`` as configured, with the port that it got."""
        return join(self._settings.host, self.port)

    async def start(self) -> None:
        """Bind and begin to answer.

        Raises:
            ConfigError: the port is taken.
        """
        times = self._settings.times
        self._listener = MetadataListener(
            self._service, self._settings.secret, self._settings.host, self._settings.port, times.ttl_s / 3
        )
        await self._listener.start()
        self._sweeper = asyncio.create_task(self._sweep(times.ttl_s / 2))
        logger.info("metadata server listens on %s, lease TTL %.1f s", self.address, times.ttl_s)

    async def serve(self) -> None:
        """Answer until ``request_stop``, then stop with the configured grace."""
        await self._stopping.wait()
        await self.stop(self._settings.grace_s)

    def request_stop(self) -> None:
        """Make ``serve`` return soon; call it from the event loop (a signal handler there is one)."""
        self._stopping.set()

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give running ones ``grace`` seconds, cut the rest; idempotent."""
        self._stopping.set()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
        if self._listener is not None:
            await self._listener.stop(grace)

    async def _sweep(self, every: float) -> None:
        while True:
            await asyncio.sleep(every)
            await self._service.sweep()


async def serve(
    settings: ServerSettings,
    *,
    store: Store | None = None,
    observer: Observer | None = None,
    started: Callable[[MetadataServer], None] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT; then stop gracefully.

    Args:
        settings: see :class:`ServerSettings`.
        store: where records are kept.
        observer: for metrics.
        started: called once with the server when it answers.

    Raises:
        ConfigError: the port is taken.
    """
    server = MetadataServer(settings, store=store, observer=observer)
    loop = asyncio.get_running_loop()
    await server.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.request_stop)
    try:
        if started is not None:
            started(server)
        await server.serve()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await server.stop(settings.grace_s)


class EmbeddedServer:
    """A metadata server in a thread of its own, for tests, the demo and embedding. A context manager.

    Args:
        settings: see :class:`ServerSettings`.
        observer: for metrics.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, settings: ServerSettings, *, observer: Observer | None = None) -> None:
        self._settings = settings
        self._observer = observer
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: MetadataServer | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="weightwire-metadata", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_S):
            raise ConfigError(f"the metadata server did not start within {START_S:.0f} s", "see the log")
        failure = self._failed()
        if failure is not None:
            self._thread.join()
            raise failure

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self._server is not None
        return self._server.port

    @property
    def url(self) -> str:
        """``host:port`` for clients."""
        assert self._server is not None
        return self._server.address

    def stop(self) -> None:
        """Stop with the configured grace; returns when done. Idempotent."""
        if self._loop is not None and self._server is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop ended between the check and the call
                self._loop.call_soon_threadsafe(self._server.request_stop)
        self._thread.join(self._settings.grace_s + 10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _failed(self) -> Exception | None:
        return self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:  # the thread's edge: the constructor raises it
            self._failure = error
            if self._ready.is_set() or not isinstance(error, WeightwireError):
                logger.exception("the embedded metadata server ended")
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = MetadataServer(self._settings, observer=self._observer)
        await self._server.start()
        self._ready.set()
        await self._server.serve()
