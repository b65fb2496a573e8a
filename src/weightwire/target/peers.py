"""What a pull asks of its peers, what it allows them, and what it says of them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from weightwire.errors import AuthError, PeerStalled, TransferError
from weightwire.target.shares import Share
from weightwire.transport.base import Connection


class Session(Protocol):
    """One peer under a read lease, as the pull needs it."""

    @property
    def label(self) -> str:
        """How logs and reports name the peer."""
        ...

    @property
    def transport(self) -> str:
        """Name of the transport that reads from it."""
        ...

    @property
    def lanes(self) -> int:
        """How many connections to it pay."""
        ...

    @property
    def rate(self) -> float:
        """Bytes a second that the peer grants us, all lanes together; 0 for no bound."""
        ...

    def connect(self, deadline: float) -> Connection:
        """One more connection to the peer; raises TransferError or AuthError."""
        ...

    @property
    def relaying(self) -> bool:
        """Whether it is still filling, from a peer: it is read rather than a whole source."""
        ...

    @property
    def growing(self) -> bool:
        """Whether it has nothing but what ``watch`` tells."""
        ...

    @property
    def share(self) -> Share:
        """The leaves for which it is the one to ask."""
        ...

    @property
    def limit(self) -> int:
        """The leaves that it may ever be asked for, as bits."""
        ...

    def watch(self, failed: Callable[[TransferError], None], offers: Callable[[int], None]) -> None:
        """Follow the peer; returns at once.

        Args:
            failed: called, from any thread, when the peer is known to be of no more use.
            offers: called, from any thread, with leaves (bits) that the peer has from now on.
        """
        ...

    def close(self) -> None:
        """The peer is not read from any more; quick, idempotent."""
        ...


@dataclass(kw_only=True)
class PeerShare:
    """What one peer contributed. Written by its lanes under the pull's lock.

    Attributes:
        peer: its label.
        path: what carried the bytes, for instance ``tcp`` or ``nixl/ucx:cma``.
        nbytes: verified bytes from it.
        outrun: connections to it that were ended because others had brought what it owed, much sooner.
        bad_leaves: leaves that arrived with a wrong digest.
        relay: it was still filling when it was joined.
        error: why it was dropped, or ``None``.
    """

    peer: str
    path: str = ""
    nbytes: int = 0
    outrun: int = 0
    bad_leaves: int = 0
    relay: bool = False
    error: TransferError | AuthError | None = None


@dataclass(kw_only=True)
class PullReport:
    """What a pull did. ``verify_s`` and ``wire_s`` are summed over lanes, so they may exceed the wall time.

    ``duplicated``: bytes that were asked for twice at the end, because a peer was much slower than another.
    """

    seconds: float = 0.0
    wire_s: float = 0.0
    verify_s: float = 0.0
    retries: int = 0
    duplicated: int = 0
    shares: list[PeerShare] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How long a pull may take, and how much it does at a time.

    Attributes:
        deadline: ``time.monotonic()`` value for the whole load.
        stall_s: seconds without a finished read after which a peer is dropped.
        growth_s: seconds for which a peer that is still filling may have nothing new.
        fence_s: seconds that a fence may take.
        lanes: most connections to one peer.
        peers: peers read from at a time.
    """

    deadline: float
    stall_s: float = 10.0
    growth_s: float = 10.0
    fence_s: float = 10.0
    lanes: int = 4
    peers: int = 5


class NothingNewError(PeerStalled):
    """A relay got nothing new for too long. That may be no fault of its own: nobody is blamed."""


class NoDerivedError(TransferError):
    """All weights are there, or can be; derived tensors are not, because every peer that is left has its own."""
