"""What the metadata server knows of one publication, and how each message changes it. Pure: time is an argument.

Every message carries (incarnation, generation, sequence) and applies only if it is not behind what is known; what was
withdrawn leaves a tombstone, so that nothing that was under way revives it (hazard H68).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from weightwire.errors import MetadataError, ProtocolError
from weightwire.wire.messages import (
    CheckResult,
    KeepUpdate,
    PublicationRecord,
    PublicationState,
    Withdrawal,
)
from weightwire.wire.reports import FailureKind, PeerFailure

MAX_BLAMES = 64
MAX_RECHECKS = 16
"""Leaves that a source is asked to digest again per beat: reports cannot keep it from its work."""

Key = tuple[str, str]
"""Shard key and incarnation."""


@dataclass(frozen=True, slots=True)
class Blame:
    """One report that counted; a host has at most one of each kind on one publication."""

    host: str
    kind: FailureKind
    leaf: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One publication, or its tombstone.

    Attributes:
        record: None in a tombstone.
        lease_id: what its keeper calls it.
        stream: the ``Keep`` stream that keeps it; "" while none does.
        suspect: its stream broke.
        superseded: its endpoint belongs to a later incarnation now; it never serves again.
        expires_at: end of the lease, or of the tombstone.
        arrived_at: of its first message.
        arrival: number in the order of first messages.
        relayed: number in the order in which relays began to pass on what they receive; 0 before.
        progressed_at: when its progress last moved.
        blames: reports that count against this generation.
        check_failed: it found a leaf changed itself.
        rechecks: leaves that it shall digest again.
    """

    shard_key: str
    incarnation: str
    generation: int
    sequence: int
    record: PublicationRecord | None
    lease_id: str = ""
    stream: str = ""
    suspect: bool = False
    superseded: bool = False
    expires_at: float = 0.0
    arrived_at: float = 0.0
    arrival: int = 0
    relayed: int = 0
    progressed_at: float = 0.0
    blames: tuple[Blame, ...] = ()
    check_failed: bool = False
    rechecks: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        """Where it is stored."""
        return self.shard_key, self.incarnation


@dataclass(frozen=True, slots=True)
class Fresh:
    """What a slot gets from outside: an unguessable lease id, and the next place in the order of messages."""

    lease_id: str
    arrival: int


def published(slot: Slot | None, record: PublicationRecord, now: float, ttl: float, fresh: Fresh) -> Slot:
    """After ``Publish``.

    Raises:
        MetadataError: something later about this publication was applied before.
        ProtocolError: the record contradicts itself.
    """
    check(record)
    known = alive(slot, now)
    if known is None:
        return Slot(
            shard_key=record.shard_key,
            incarnation=record.incarnation,
            generation=record.generation,
            sequence=record.sequence,
            record=record,
            lease_id=fresh.lease_id,
            expires_at=now + ttl,
            arrived_at=now,
            arrival=fresh.arrival,
            relayed=fresh.arrival if record.state is PublicationState.RELAYING else 0,
            progressed_at=now,
        )
    if known.record is None:
        return _reborn(known, record, now, ttl, fresh)
    if record.generation < known.generation or record.sequence < known.sequence:
        raise _late(record.shard_key)
    if record.sequence == known.sequence:
        if _essence(record) != _essence(known.record):
            raise _late(record.shard_key)
        return known  # a repeated message
    begins = record.state is PublicationState.RELAYING and known.record.state is not PublicationState.RELAYING
    turn = fresh.arrival if begins else known.relayed
    return dataclasses.replace(_updated(known, record, now, ttl), relayed=turn)


def kept(slot: Slot | None, update: KeepUpdate, stream: str, now: float, ttl: float) -> tuple[Slot | None, bool]:
    """After one lease's part of a beat; whether the lease is known."""
    known = alive(slot, now)
    if known is None or known.record is None:
        return slot, False
    held = dataclasses.replace(known, stream=stream, suspect=False, expires_at=now + ttl, rechecks=())
    if update.sequence < known.sequence or update.generation < known.generation:
        return held, True  # its publish overtook this beat: alive, but the news is old
    record = dataclasses.replace(
        known.record,
        generation=update.generation,
        sequence=update.sequence,
        state=update.state,
        fraction=update.fraction,
        bytes_done=update.bytes_done,
        active_reads=update.active_reads,
    )
    try:
        check(record)
    except ProtocolError:
        return held, True  # it became readable before its publish told us what it holds
    return _updated(held, record, now, ttl), True


def broken(slot: Slot | None, stream: str) -> Slot | None:
    """After the stream that kept it ended: suspect at once, gone when the lease ends."""
    if slot is None or slot.stream != stream or slot.record is None:
        return slot
    return dataclasses.replace(slot, suspect=True, stream="")


def withdrawn(slot: Slot | None, message: Withdrawal, now: float, ttl: float) -> Slot:
    """After ``Withdraw``: a tombstone for two TTLs; a late one leaves everything as it is."""
    known = alive(slot, now)
    if known is not None and known.sequence > message.sequence:
        return known
    return Slot(
        shard_key=message.shard_key,
        incarnation=message.incarnation,
        generation=max(message.generation, known.generation if known else 0),
        sequence=message.sequence,
        record=None,
        expires_at=now + 2 * ttl,
    )


def blamed(slot: Slot, failure: PeerFailure, host: str, now: float) -> Slot:
    """After a report that counts."""
    blame = Blame(host, failure.kind, failure.leaf, now)
    others = tuple(item for item in slot.blames if (item.host, item.kind) != (host, failure.kind))
    rechecks = slot.rechecks
    asked = failure.kind.blames_bytes and failure.leaf >= 0 and failure.leaf not in rechecks
    if asked and len(rechecks) < MAX_RECHECKS:
        rechecks += (failure.leaf,)
    return dataclasses.replace(slot, blames=(*others, blame)[-MAX_BLAMES:], rechecks=rechecks)


def checked(slot: Slot | None, result: CheckResult) -> Slot | None:
    """After a source digested a leaf again: a failure condemns it, a success clears what one reporter said of it."""
    if slot is None or slot.record is None:
        return slot
    if not result.ok:
        return dataclasses.replace(slot, check_failed=True)
    hosts = {blame.host for blame in slot.blames if blame.kind.blames_bytes}
    if len(hosts) > 1:
        return slot
    blames = tuple(b for b in slot.blames if not (b.kind.blames_bytes and b.leaf == result.leaf))
    return dataclasses.replace(slot, blames=blames)


def forgiven(slot: Slot, now: float, report_ttl: float) -> Slot:
    """Without the reports that have expired."""
    left = tuple(blame for blame in slot.blames if now - blame.at < report_ttl)
    return slot if len(left) == len(slot.blames) else dataclasses.replace(slot, blames=left)


def alive(slot: Slot | None, now: float) -> Slot | None:
    """``slot`` unless its time is over."""
    return slot if slot is not None and now < slot.expires_at else None


def check(record: PublicationRecord) -> None:
    """Refuse what cannot be true.

    Raises:
        ProtocolError: naming the contradiction.
    """
    sizes = record.coordinates
    state = record.state
    if state is PublicationState.WITHDRAWN:
        raise ProtocolError("a withdrawn shard cannot be published", "use Withdraw")
    if not (record.shard_key and record.replica_key and record.incarnation and record.replica_incarnation):
        raise ProtocolError("a publication needs its keys and incarnations")
    if not 1 <= record.world_size <= 2**20 or record.world_size < sizes.tp_size * sizes.pp_size:
        raise ProtocolError(f"world size {record.world_size} cannot hold {sizes.label()}")
    known = bool(record.content_id and record.weights_id)
    follows = state is PublicationState.RELAYING and bool(record.following)
    if state.readable and not (record.endpoints and (known or follows)):
        raise ProtocolError(f"a {state} shard needs its content id, its weights id and an endpoint")


def _reborn(tomb: Slot, record: PublicationRecord, now: float, ttl: float, fresh: Fresh) -> Slot:
    if record.sequence <= tomb.sequence or record.generation < tomb.generation:
        raise MetadataError(
            f"shard {record.shard_key} of this process was withdrawn", "publish it anew, with a later sequence"
        )
    return published(None, record, now, ttl, fresh)


def _updated(known: Slot, record: PublicationRecord, now: float, ttl: float) -> Slot:
    before = known.record
    moved = before is None or record.state is not before.state or record.bytes_done > before.bytes_done
    moved = moved or (before is not None and record.fraction > before.fraction)
    new_bytes = record.generation > known.generation
    return dataclasses.replace(
        known,
        generation=record.generation,
        sequence=record.sequence,
        record=record,
        expires_at=now + ttl,
        progressed_at=now if moved else known.progressed_at,
        blames=() if new_bytes else known.blames,
        check_failed=known.check_failed and not new_bytes,
    )


def _essence(record: PublicationRecord) -> PublicationRecord:
    return dataclasses.replace(record, fraction=0.0, bytes_done=0, active_reads=0)


def _late(shard_key: str) -> MetadataError:
    return MetadataError(f"a later message about shard {shard_key} was applied before", "send the present state")
