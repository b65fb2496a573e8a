"""One process as a member of a fleet: everything it needs to read from peers, and to be read from."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from weightwire.auth import Secret, load_secret
from weightwire.config import Settings
from weightwire.errors import ConfigError, PublishError
from weightwire.metadata.client import MetadataClient
from weightwire.metadata.endpoints import check_endpoint, local_address
from weightwire.source.caps import Caps
from weightwire.source.node import Node
from weightwire.target.reader import Reader
from weightwire.transport.base import ReadGate, Transport
from weightwire.transport.host import host_id
from weightwire.transport.opening import Opened, close_transports, open_transports

log = logging.getLogger(__name__)


class Member:
    """Open until ``close``. Serves nothing until ``node`` is asked for. Not thread-safe to open and close.

    Args:
        settings: with a metadata server's address.
        serves: whether others can read from it; a pure target has no listening socket.

    Raises:
        ConfigError: no address of a metadata server, or no transport works here.
        PublishError: others could not reach what would be advertised; names address and interface.
        AuthError: the secret file cannot be used.
    """

    def __init__(self, settings: Settings, *, serves: bool = True) -> None:
        if settings.url is None:
            raise ConfigError("no metadata server is named", "give url=host:port or set WEIGHTWIRE_URL")
        self.settings = settings
        self.secret: Secret = load_secret(settings.secret_file)
        self.metadata = MetadataClient(settings.url, self.secret)
        self._node: Node | None = None
        self._bind = settings.bind or local_address(settings.url)
        # apart from those that serve: memory that is being filled must not be registered for others to read
        self._reading: Opened = open_transports(settings, self.secret, None, self._bind, self._bind)
        if serves:
            self._node = self._serve()
        self.incarnation = self._node.incarnation if self._node else uuid.uuid4().hex

    @property
    def node(self) -> Node:
        """This process as a source.

        Raises:
            ConfigError: it was opened to read only.
        """
        if self._node is None:
            raise ConfigError("this process was opened to read only", "open it with serves=True")
        return self._node

    @property
    def reader(self) -> Reader:
        """This process as a target."""
        return Reader(
            metadata=self.metadata,
            secret=self.secret,
            transports=self._reading.transports,
            unavailable=self._reading.unavailable,
            incarnation=self.incarnation,
            host=host_id(),
            stall_s=self.settings.stall_timeout,
            load_s=self.settings.load_timeout,
            wait_for_loading_s=self.settings.wait_for_loading,
        )

    def close(self) -> None:
        """Withdraw what is published and let go of everything; bounded, idempotent."""
        if self._node is not None:
            self._node.close()
        close_transports(self._reading)
        self.metadata.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> Node:
        advertise = self.settings.advertise or self._bind
        caps = Caps(max_rate=self.settings.max_rate, max_readers=self.settings.max_readers)

        def open_all(gates: Callable[[str], ReadGate]) -> Mapping[str, Transport]:
            return open_transports(self.settings, self.secret, gates, self._bind, advertise, caps.pacer).transports

        node = Node(
            metadata=self.metadata,
            keeper=self.metadata.keeper,
            secret=self.secret,
            open_transports=open_all,
            bind=self._bind,
            advertise=advertise,
            caps=caps,
        )
        try:
            for endpoint in node.endpoints:
                check_endpoint(endpoint, self.metadata.url)
        except PublishError:
            node.close()
            raise
        return node
