"""What a process needs to read from peers, put together once and shared by all its loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightwire.auth import Secret
from weightwire.metadata.api import Metadata
from weightwire.transport.base import Transport


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The means of reading.

    Attributes:
        metadata: the metadata server.
        secret: the shared secret.
        transports: name -> transport, preferred first.
        unavailable: name -> why a transport that was wished for cannot be used here.
        incarnation: this process life, as peers are told.
        host: this machine, as peers are told.
        stall_s: seconds without progress after which a peer is dropped.
        load_s: seconds for one load in all.
        wait_for_loading_s: seconds to wait for a replica that is still loading.
    """

    metadata: Metadata
    secret: Secret
    transports: Mapping[str, Transport]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    incarnation: str
    host: str
    stall_s: float = 10.0
    load_s: float = 600.0
    wait_for_loading_s: float = 300.0
