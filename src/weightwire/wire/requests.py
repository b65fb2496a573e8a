"""The requests that have no message of their own in the domain: their fields are plain arguments there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Empty:
    """Nothing."""


@dataclass(frozen=True, slots=True)
class SourcesRequest:
    """``MetadataService.sources``."""

    model_id: str


@dataclass(frozen=True, slots=True)
class DecideRequest:
    """``MetadataService.decide``."""

    key: str
    value: bytes | None
    wait_s: float


@dataclass(frozen=True, slots=True)
class ShardRequest:
    """``PeerService.status`` and ``PeerService.manifest`` of one incarnation."""

    shard_key: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class ProgressRequest:
    """``PeerService.progress`` of one incarnation."""

    incarnation: str
    lease: bytes
    since: int


@dataclass(frozen=True, slots=True)
class CloseReadRequest:
    """``PeerService.close_read`` of one incarnation."""

    incarnation: str
    lease: bytes


@dataclass(frozen=True, slots=True)
class SelfCheckRequest:
    """``PeerService.self_check`` of one incarnation."""

    shard_key: str
    incarnation: str
    leaf: int


@dataclass(frozen=True, slots=True)
class SelfCheckResponse:
    """What ``PeerService.self_check`` found."""

    ok: bool
