"""The end of a load that followed a reader of a disk: what all of it turned out to be, and whether it may be used."""

from __future__ import annotations

import logging
import time

from weightwire.errors import AuthError, MetadataError, PeerLost, ProtocolError, TransferError, WeightsConflict
from weightwire.manifest.records import Manifest
from weightwire.metadata.selection import Policy, after_following
from weightwire.target.reader import Reader
from weightwire.target.session import contact
from weightwire.wire.messages import Candidate, FindReplicas, FindShard, PeerStatus

log = logging.getLogger(__name__)

ASK_S = 0.2
"""Between two questions what the followed replica turned out to hold."""

_ELSEWHERE = "another source, or the disk, is read"


def still_followed(reader: Reader, followed: str, candidates: tuple[Candidate, ...]) -> None:
    """Notice early that what is read can never be confirmed: its followers would wait for each other.

    Args:
        reader: our means.
        followed: replica incarnation of the reader of the disk.
        candidates: all that are known.

    Raises:
        PeerLost: it does not answer, and nobody knows what it had read.
    """
    if any(each.record.weights_id for each in candidates):
        return
    followed_ranks = [each for each in candidates if each.record.replica_incarnation == followed]
    if followed_ranks and all(_status(reader, each) is None for each in followed_ranks):
        raise PeerLost("the replica that was followed is gone before all of it was read", _ELSEWHERE)


def outcome(reader: Reader, find: FindShard, known: tuple[Candidate, ...], manifest: Manifest, deadline: float) -> str:
    """Wait until the followed replica, or one that followed it, publishes what all of it is; its weights id.

    Args:
        reader: our means.
        find: who follows it; names its replica incarnation.
        known: who was found before, for when the metadata server cannot be reached.
        manifest: what was received here.
        deadline: ``time.monotonic()`` value for the whole load.

    Raises:
        ProtocolError: it publishes something else than it told while it was read.
        PeerLost: it is gone, or withdrew, before it said what it is.
        TransferError: it did not say so in time.
    """
    heard = time.monotonic()
    while True:
        known = _candidates(reader, find) or known
        statuses = _statuses(reader, find, known)
        for status in statuses:
            if status.weights_id:
                _compare(status, manifest)
                return status.weights_id
        now = time.monotonic()
        heard = now if statuses else heard
        if now - heard > reader.stall_s:
            raise PeerLost("the replica that was followed is gone before it said what it had read", _ELSEWHERE)
        if now >= deadline:
            raise TransferError("the replica that was followed did not finish in time", _ELSEWHERE)
        time.sleep(ASK_S)


def refuse_conflict(reader: Reader, query: FindReplicas, policy: Policy, weights_id: str) -> None:
    """For the leader: what would have been refused had it been ready from the beginning is refused now.

    Where the metadata server was started empty a moment ago, that is waited for, at most one TTL. Where it cannot be
    reached, the load goes on, as every load does that has begun.

    Raises:
        WeightsConflict: other weights are ready under the same identity, or these are not the pinned ones.
    """
    until: float | None = None
    while True:
        try:
            listing = reader.metadata.find_replicas(query)
        except MetadataError as error:
            log.warning("whether other weights became ready meanwhile is not known: %s", error)
            return
        reason = after_following(weights_id, listing, policy)
        if reason:
            raise WeightsConflict(reason, "pin one by its weights id or revision, or ask for the latest")
        now = time.monotonic()
        until = now + listing.warming_s if until is None else until
        if policy.weights_id or not listing.warming or now >= until:
            return
        time.sleep(ASK_S)


def _candidates(reader: Reader, find: FindShard) -> tuple[Candidate, ...]:
    try:
        return reader.metadata.find_shard(find).candidates
    except MetadataError as error:
        log.info("asking those who are known: %s", error)
        return ()


def _statuses(reader: Reader, find: FindShard, known: tuple[Candidate, ...]) -> list[PeerStatus]:
    """Of the replica that is followed, if it answers, and of those who know its ids; these first."""
    worth = [each for each in known if each.record.weights_id or _is_followed(each, find)]
    found = [status for status in (_status(reader, each) for each in worth) if status is not None]
    return sorted(found, key=lambda status: not status.weights_id)


def _is_followed(candidate: Candidate, find: FindShard) -> bool:
    return candidate.record.replica_incarnation == find.following


def _status(reader: Reader, candidate: Candidate) -> PeerStatus | None:
    try:
        client = contact(reader, candidate)
    except (TransferError, AuthError):
        return None
    try:
        return client.status(candidate.record.shard_key)
    except (TransferError, AuthError):
        return None
    finally:
        client.close()


def _compare(status: PeerStatus, manifest: Manifest) -> None:
    if (status.content_id, status.derived_id) != (manifest.content_id, manifest.derived_id):
        raise ProtocolError(
            f"process {status.incarnation[:8]} publishes {status.content_id[:12]}, but told the digests of "
            f"{manifest.content_id[:12]} while it was read",
            _ELSEWHERE,
        )
