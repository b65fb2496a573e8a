"""Which source to take: the order of candidates, and what a listing means for a target. Pure.

The server ranks (``rank``); the target's leader decides (``choose``), and only it: the choice is part of the replica's
write-once decision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from weightwire.metadata.slots import Slot
from weightwire.metadata.standing import Standing
from weightwire.wire.messages import (
    Candidate,
    LoadingReplica,
    OtherReplica,
    PublicationState,
    Rejection,
    ReplicaListing,
    ReplicaOffer,
    WeightsGroup,
)

# --------------------------------------------------------------------------------------------------------------------
# The order of candidates for one shard


def rank(found: Iterable[tuple[Slot, Standing]]) -> list[Candidate]:
    """Idle relays, idle replicas, busy ones by their load, reported ones, suspects; quarantined ones never.

    Equals are ordered by incarnation, so that the answer depends on nothing else.
    """
    usable = [(slot, view) for slot, view in found if slot.record is not None and not view.quarantine]
    ordered = sorted(usable, key=lambda item: _place(*item))
    return [_candidate(slot, view) for slot, view in ordered]


def _place(slot: Slot, view: Standing) -> tuple[bool, bool, int, bool, float, str]:
    assert slot.record is not None
    relay = slot.record.state is PublicationState.RELAYING
    busy = slot.record.active_reads
    return (view.suspect, view.reports > 0, busy, not relay, -slot.record.fraction, slot.incarnation)


def _candidate(slot: Slot, view: Standing) -> Candidate:
    assert slot.record is not None
    kind = "relay" if slot.record.state is PublicationState.RELAYING else "replica"
    load = f"busy with {slot.record.active_reads} readers" if slot.record.active_reads else "idle"
    notes = [f"{load} {kind}"]
    if view.reports:
        notes.append(f"{view.reports} reports against it")
    if view.suspect:
        notes.append("suspect: its stream to the server broke")
    record = dataclasses.replace(slot.record, identity="")  # the asker has it: it asked by its hash
    return Candidate(record=record, reason=", ".join(notes), suspect=view.suspect, reports=view.reports)


# --------------------------------------------------------------------------------------------------------------------
# What a listing means


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator demands of a source.

    Attributes:
        weights_id: take exactly these weights; "" for not pinned.
        revision: take only this one; "" for not named.
        accept_unpinned: without ``weights_id`` and ``revision``, still take what is there.
        latest: of several weights, take those with the highest ordinal.
    """

    weights_id: str = ""
    revision: str = ""
    accept_unpinned: bool = False
    latest: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """Take these weights.

    Attributes:
        unpinned: nothing but the name said that these are the right weights; reports say so in capitals.
    """

    group: WeightsGroup
    unpinned: bool


@dataclass(frozen=True, slots=True)
class Conflict:
    """Several weights are ready under one identity, and nothing says which: refused."""

    groups: tuple[WeightsGroup, ...]

    def describe(self) -> str:
        """One line that names them."""
        names = ", ".join(_name(group) for group in self.groups[:8])
        return f"{len(self.groups)} different weights are ready under one identity: {names}"


@dataclass(frozen=True, slots=True)
class Warming:
    """The server started empty a moment ago: another set of weights may not have come back yet.

    Attributes:
        retry_s: ask again after so long.
    """

    retry_s: float
    groups: tuple[WeightsGroup, ...]


@dataclass(frozen=True, slots=True)
class Unpinned:
    """There is a source, but nothing says that its weights are the wanted ones, and that was not accepted."""

    group: WeightsGroup

    def describe(self) -> str:
        """One line that names it."""
        return f"the only weights ready are {_name(self.group)}, and this replica names no revision and no weights id"


@dataclass(frozen=True, slots=True)
class Nothing:
    """No complete replica can be taken.

    Attributes:
        loading: replicas that may be worth waiting for (see ``worth_waiting``).
        others: what exists of the same model otherwise; never reported as "no source".
        rejected: what was not good enough, and why.
        warming_s: seconds for which the server may still be missing sources.
    """

    loading: tuple[LoadingReplica, ...]
    others: tuple[OtherReplica, ...]
    rejected: tuple[Rejection, ...]
    warming_s: float

    def describe(self) -> str:
        """One line: what there is instead."""
        parts = []
        if self.loading:
            parts.append(f"{len(self.loading)} replicas still loading")
        if self.others:
            kinds = sorted({f"{other.stage} ({other.state})" for other in self.others})
            parts.append(f"of this model there is: {', '.join(kinds)}, under another identity")
        parts.extend(f"{item.subject}: {item.reason}" for item in self.rejected[:3])
        return "; ".join(parts) or "nobody serves this model"


Outcome = Chosen | Conflict | Warming | Unpinned | Nothing


def choose(listing: ReplicaListing, policy: Policy) -> Outcome:
    """What a target's leader may take, if anything.

    Groups are tried stage by stage, in the order in which the target prefers them.
    """
    fitting, rejected = _fitting(listing, policy)
    if not fitting:
        return Nothing(listing.loading, listing.others, rejected, listing.warming_s)
    first = fitting[0].replica_key
    groups = tuple(group for group in fitting if group.replica_key == first)
    pinned = bool(policy.weights_id)
    if listing.warming and not pinned:
        return Warming(listing.warming_s, groups)
    if len(groups) > 1:
        newest = _newest(groups) if policy.latest else None
        if newest is None:
            return Conflict(groups)
        groups = (newest,)
    unpinned = not (pinned or policy.revision)
    if unpinned and not policy.accept_unpinned:
        return Unpinned(groups[0])
    return Chosen(groups[0], unpinned)


def worth_waiting(loading: Iterable[LoadingReplica], own_disk_s: float, patience_s: float) -> LoadingReplica | None:
    """The replica to wait for instead of reading the own disk, if any.

    Only one that registered before we did (so that two never wait for each other), whose lease lives, that made
    progress within ``patience_s`` and is expected to finish before our own disk would.

    Args:
        loading: of a listing.
        own_disk_s: how long reading the own disk would take; ``inf`` where there is none.
        patience_s: the longest silence that still counts as progress.
    """
    worth = [
        (expected_s(item), item.replica_incarnation, item)
        for item in loading
        if item.earlier and item.live and item.quiet_s <= patience_s and expected_s(item) < own_disk_s
    ]
    return min(worth, key=lambda entry: entry[:2])[2] if worth else None


def expected_s(item: LoadingReplica) -> float:
    """Seconds until a loading replica has all its bytes, by its speed so far; ``inf`` while it has none."""
    if item.fraction >= 1 or item.state in (PublicationState.HELD, PublicationState.PAUSED):
        return 0.0
    if item.fraction <= 0:
        return math.inf
    return item.elapsed_s * (1 - item.fraction) / item.fraction


def _fitting(listing: ReplicaListing, policy: Policy) -> tuple[list[WeightsGroup], tuple[Rejection, ...]]:
    fitting, rejected = [], list(listing.rejected)
    for group in listing.groups:
        reason = _refusal(group, policy)
        if reason:
            rejected.append(Rejection(subject=_name(group), reason=reason))
        else:
            fitting.append(group)
    return fitting, tuple(rejected)


def _refusal(group: WeightsGroup, policy: Policy) -> str:
    if policy.weights_id and group.weights_id != policy.weights_id:
        return f"not the pinned weights {policy.weights_id[:12]}"
    if policy.revision and policy.revision not in group.revisions:
        return f"not revision {policy.revision}"
    return ""


def _newest(groups: tuple[WeightsGroup, ...]) -> WeightsGroup | None:
    top = max(group.ordinal for group in groups)
    newest = [group for group in groups if group.ordinal == top]
    return newest[0] if len(newest) == 1 else None


def _name(group: WeightsGroup) -> str:
    revisions = ", ".join(revision for revision in group.revisions if revision) or "no revision"
    return f"{group.weights_id[:12]} ({revisions})"


def order_offers(offers: Iterable[ReplicaOffer]) -> tuple[ReplicaOffer, ...]:
    """Whole replicas, best first; the same order as for shards."""
    return tuple(sorted(offers, key=lambda o: (o.suspect, o.reports > 0, o.active_reads, o.replica_incarnation)))
