"""A reader's view of one source's peer endpoint, synchronous and bounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from weightwire.auth import Secret
from weightwire.errors import PeerLost
from weightwire.manifest.offered import Offered
from weightwire.wire.channel import Channel
from weightwire.wire.codec import decode, encode
from weightwire.wire.manifest_codec import collect_grant, collect_manifest
from weightwire.wire.messages import ManifestHeader, OpenRead, PeerStatus, ProgressUpdate, ReadGrant
from weightwire.wire.methods import PEER
from weightwire.wire.requests import (
    CloseReadRequest,
    ProgressRequest,
    SelfCheckRequest,
    SelfCheckResponse,
    ShardRequest,
)
from weightwire.wire.status import Callee

Mine = TypeVar("Mine", PeerStatus, ManifestHeader)

PROGRESS_S = 86_400.0
"""The longest that one ``Progress`` stream lasts."""


class PeerClient:
    """The peer endpoint of one incarnation. Thread safe. Another process at its address is ``PeerLost``.

    All methods raise ``PeerLost`` (nobody answers, or another incarnation), ``PeerStalled`` (no answer in time),
    ``AuthError``, ``ProtocolError`` (an answer out of bounds), ``GenerationMoved`` (no longer offered), and whatever
    else ``PeerService`` says. ``timeout`` is in seconds, for the whole call.

    Args:
        target: ``host:port``.
        incarnation: the process life that is meant.
        secret: the shared secret.
        timeout: for calls that name none.
    """

    def __init__(self, target: str, incarnation: str, secret: Secret, *, timeout: float = 10.0) -> None:
        self.target = target
        self.incarnation = incarnation
        self._timeout = timeout
        self._channel = Channel(target, secret, Callee.PEER)

    def status(self, shard_key: str, *, timeout: float | None = None) -> PeerStatus:
        """Generation and state: liveness confirmed by contact."""
        answer = self._unary("Status", ShardRequest(shard_key, self.incarnation), timeout)
        return self._mine(decode(PeerStatus, answer))

    def manifest(self, shard_key: str, *, timeout: float | None = None) -> tuple[ManifestHeader, Offered]:
        """The manifest, checked against the ids in its header; not taken apart."""
        parts = self._stream("GetManifest", ShardRequest(shard_key, self.incarnation), timeout)
        header, offered = collect_manifest(parts)
        return self._mine(header), offered

    def open_read(self, request: OpenRead, *, timeout: float | None = None) -> ReadGrant:
        """A read lease; give it back with ``close_read``."""
        return collect_grant(self._stream("OpenRead", request, timeout))

    def progress(self, lease: bytes, since: int = 0, *, stall_s: float = 10.0) -> Iterator[ProgressUpdate]:
        """Updates until the source is complete; close the iterator to stop earlier.

        Args:
            lease: of ``open_read``.
            since: version of the last update that was seen; 0 for all.
            stall_s: without any update for so long the source counts as stalled.
        """
        request = ProgressRequest(self.incarnation, lease, since)
        method = PEER["Progress"]
        messages = self._channel.stream(method, encode(request, method.request), PROGRESS_S, stall_s)
        with contextlib.closing(messages):
            for message in messages:
                yield decode(ProgressUpdate, message)

    def close_read(self, lease: bytes, *, timeout: float | None = None) -> None:
        """Give a read lease back; idempotent."""
        self._unary("CloseRead", CloseReadRequest(self.incarnation, lease), timeout)

    def self_check(self, shard_key: str, leaf: int, *, timeout: float | None = None) -> bool:
        """Have the source digest one leaf again."""
        request = SelfCheckRequest(shard_key, self.incarnation, leaf)
        return decode(SelfCheckResponse, self._unary("SelfCheck", request, timeout)).ok

    def close(self) -> None:
        """End all calls; idempotent."""
        self._channel.close()

    def _mine(self, answer: Mine) -> Mine:
        if answer.incarnation != self.incarnation:
            raise PeerLost(f"another process answers at {self.target}", "ask for sources again")
        return answer

    def _unary(self, name: str, value: object, timeout: float | None) -> Any:
        method = PEER[name]
        return self._channel.unary(method, encode(value, method.request), timeout or self._timeout)

    def _stream(self, name: str, value: object, timeout: float | None) -> Iterator[Any]:
        method = PEER[name]
        return self._channel.stream(method, encode(value, method.request), timeout or self._timeout)
