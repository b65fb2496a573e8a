"""What is said about sources, as plain frozen values (see ``messages``): reports, listings for people, decisions."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from weightwire.wire.messages import PublicationRecord


class FailureKind(enum.StrEnum):
    """How a source failed a target."""

    LOST = "LOST"
    STALLED = "STALLED"
    MISMATCH = "MISMATCH"
    PROTOCOL = "PROTOCOL"

    @property
    def blames_bytes(self) -> bool:
        """Whether it speaks of wrong content (may lead to quarantine), not of a dead or slow source."""
        return self in (FailureKind.MISMATCH, FailureKind.PROTOCOL)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFailure:
    """A target tells which source failed it and how.

    Attributes:
        generation: the source generation that was read; a report on an older one than the current is no blame.
        leaf: the leaf that was wrong, or -1.
        reporter, reporter_host: incarnation of the reporting process, and stable id of its machine.
        detail: one line for the log.
    """

    shard_key: str
    incarnation: str
    generation: int
    kind: FailureKind
    leaf: int = -1
    reporter: str
    reporter_host: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportAnswer:
    """What the server made of a report."""

    counted: bool
    quarantined: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceView:
    """One publication as the server sees it, for ``weightwire sources``."""

    record: PublicationRecord
    suspect: bool
    quarantined: bool
    reports: int
    age_s: float
    remaining_s: float
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A write-once value. ``value`` is None when nothing was recorded within the wait."""

    key: str
    value: bytes | None
