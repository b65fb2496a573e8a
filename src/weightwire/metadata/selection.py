"""Which source to take: the order of candidates, and what a listing means for a target. Pure.

The server ranks (``rank``); the target's leader decides (``choose``), and only it: the choice is part of the replica's
write-once decision.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

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


CHAIN = 32
"""So many relays form a chain; more form two striped trees."""
Found = tuple[Slot, Standing]
Source = TypeVar("Source")


def rank(found: Iterable[Found], asker: int | None = None, *, begun: bool = False) -> list[Candidate]:
    """Those that the asker is to read from, then the others; quarantined ones never.

    Whom a newcomer reads from is decided by its place among the sound relays, in the order in which they began, so that
    each carries about as much as it takes (see ``seats``). The others are ordered: idle ones, busy ones by their load,
    relays that began after the asker, reported ones, suspects. The answer depends on nothing but what is found.

    Args:
        found: slots of one shard of one set of weights, and what speaks against them.
        asker: ``Slot.relayed`` of the asker, whether it is among ``found`` or not; ``None`` for one that serves nobody.
        begun: it holds some leaves already.
    """
    usable = [(slot, view) for slot, view in found if slot.record is not None and not view.quarantine]
    others = sorted(usable, key=lambda item: _place(item, asker))
    if asker is None:
        return [_candidate(*item) for item in others]
    relays = [item for item in usable if _relays(item[0]) and item[1].good and item[0].relayed != asker]
    relays.sort(key=lambda item: item[0].relayed)
    before = bisect.bisect_left(relays, asker, key=lambda item: item[0].relayed)
    complete = [item for item in others if not _relays(item[0]) and item[1].good]
    first = [_candidate(*item, seat) for item, seat in seated(relays, before, complete, _readers, begun=begun)]
    taken = {candidate.record.incarnation for candidate in first}
    return first + [_candidate(*item) for item in others if item[0].incarnation not in taken]


def seated(
    relays: Sequence[Source],
    before: int,
    complete: Sequence[Source],
    readers: Callable[[Source], int],
    *,
    begun: bool,
    chain: int = CHAIN,
) -> list[tuple[Source, Seat]]:
    """Those that one newcomer is to read from at the same time, with what of each.

    Args:
        relays: sound ones without the asker, in order of arrival.
        before: how many of them came before the asker.
        complete: sound complete replicas, idle ones first.
        readers: of one of them, at the moment. In a tree, one that has its two already gives way to the nearest that
            has fewer: where a relay died, those that it read from have room for those that read from it.
        begun: the asker holds leaves already, so it asks because it lost somebody. If complete replicas have fewer
            readers than there are trees, that was the root of one: the asker may take its place.
        chain: see ``seats``.
    """
    found: list[tuple[Source, Seat]] = []
    rootless = begun and sum(map(readers, complete)) < 2
    for seat in seats(len(relays) + 1, before, chain):
        if seat.place is None or (rootless and complete and seat.parts > 1):
            found.extend((item, seat) for item in complete[: ROOT_SOURCES // seat.parts if seat.parts else 1])
        else:
            at = seat.place - (seat.place > before)
            if seat.parts > 1 and readers(relays[at]) >= seat.parts:
                at = _roomy(relays[:before] if at < before else relays, at, readers)
            found.append((relays[at], seat))
    return found


def _roomy(relays: Sequence[Source], near: int, readers: Callable[[Source], int]) -> int:
    """The one with the fewest readers, and of those the nearest; no later one than may be."""
    return min(range(len(relays)), key=lambda at: (readers(relays[at]), abs(at - near)))


@dataclass(frozen=True, slots=True)
class Seat:
    """One place to read from.

    Attributes:
        place: in the order of arrival of all relays, the asker among them; ``None`` for complete replicas.
        part, parts: the share of the chunks for which this is the one to ask (``target.schedule.Share``): every
            ``parts``-th from number ``part`` on; all for 1; for 0 only what does not come from elsewhere in time.
    """

    place: int | None
    part: int = 0
    parts: int = 1


ROOT_SOURCES = 4
"""Complete replicas that the first newcomers read from, all trees together: their caps add up."""


def seats(relays: int, place: int, chain: int = CHAIN) -> tuple[Seat, ...]:
    """Where the relay at ``place`` of ``relays`` (in order of arrival, the asker among them) is to read.

    Up to ``chain`` relays: from the one before it, and from the one before that what lags. The first one reads from
    complete replicas. Every relay carries one shard, a link is needed for nobody twice, and when one leaves, those
    behind it close up.

    Beyond, a chain would be too long: two trees, one for every other chunk. Relays with even places are the inner nodes
    of the first and the leaves of the second, those with odd places the other way round; each inner node has two
    children, so again every relay carries one shard: two halves of it, twice. The depth grows with the logarithm.

    Within its own tree, and in the chain, a relay reads from an earlier one only. It may take everything from there, so
    no set of relays can wait for each other (hazard H25).
    """
    if relays <= chain:
        return Seat(_at(place - 1)), *((Seat(_at(place - 2), parts=0),) if place else ())
    own = place % 2
    inner, half = (relays + 1 - own) // 2, place // 2
    return _child(own, half), _child(1 - own, relays - inner + half)


def _child(tree: int, number: int) -> Seat:
    """Where node ``number`` of a tree, in breadth-first order, reads; its inner nodes are every other relay."""
    return Seat(2 * ((number - 1) // 2) + tree if number else None, tree, 2)


def _at(place: int) -> int | None:
    return place if place >= 0 else None


def _readers(found: Found) -> int:
    return found[0].record.active_reads if found[0].record is not None else 0


def _relays(slot: Slot) -> bool:
    """Whether it fills itself from a peer: one that reads its disk stands where complete replicas do."""
    record = slot.record
    return record is not None and record.state is PublicationState.RELAYING and not record.reads_disk


def _place(found: Found, asker: int | None) -> tuple[bool, bool, bool, int, bool, float, str]:
    slot, view = found
    assert slot.record is not None
    late = _relays(slot) and asker is not None and slot.relayed > asker
    busy = slot.record.active_reads
    return (view.suspect, view.reports > 0, late, busy, not _relays(slot), -slot.record.fraction, slot.incarnation)


def _candidate(slot: Slot, view: Standing, seat: Seat | None = None) -> Candidate:
    assert slot.record is not None
    kind = "reader of its disk" if slot.record.reads_disk else "relay" if _relays(slot) else "replica"
    load = f"busy with {slot.record.active_reads} readers" if slot.record.active_reads else "idle"
    notes = [f"{load} {kind}"]
    if seat is not None:
        notes.append({0: "for what lags", 1: "next in the chain"}.get(seat.parts, f"tree {seat.part}"))
    if view.reports:
        notes.append(f"{view.reports} reports against it")
    if view.suspect:
        notes.append("suspect: its stream to the server broke")
    record = dataclasses.replace(slot.record, identity="")  # the asker has it: it asked by its hash
    return Candidate(
        record=record,
        reason=", ".join(notes),
        suspect=view.suspect,
        reports=view.reports,
        seated=seat is not None,
        part=seat.part if seat else 0,
        parts=seat.parts if seat else 1,
    )


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


def to_follow(loading: Iterable[LoadingReplica], policy: Policy, patience_s: float) -> LoadingReplica | None:
    """The reader of a disk whose leaves to take while it is reading, if any: the first that registered.

    As with waiting, only one that registered before we did and lives. Which weights it will turn out to hold is not
    known yet: a policy that takes only named ones by revision is held against what it names, one that pins a weights
    id is held against the outcome (``after_following``), and so is everything that ``choose`` would have refused.

    Args:
        loading: of a listing, in the order in which the replicas registered.
        policy: the operator's.
        patience_s: the longest silence that still counts as progress.
    """
    readers = [
        item
        for item in loading
        if item.followable and item.following == item.replica_incarnation and item.earlier and item.live
    ]
    if not (policy.weights_id or policy.revision or policy.accept_unpinned):
        return None
    if policy.latest and len(readers) > 1:  # which of them is the latest only their ids will tell
        return None
    fitting = (item for item in readers if policy.revision in ("", item.revision) and item.quiet_s <= patience_s)
    return next(fitting, None)


def after_following(weights_id: str, listing: ReplicaListing, policy: Policy) -> str:
    """Why what was followed may not be used although it is whole, in one line; "" if it may.

    It is what ``choose`` would have said of a source that was ready from the beginning, with what is known by now.

    Args:
        weights_id: what the followed replica turned out to hold.
        listing: of now.
        policy: the operator's.
    """
    if policy.weights_id and weights_id != policy.weights_id:
        return f"the followed replica holds {weights_id[:12]}, not the pinned weights {policy.weights_id[:12]}"
    outcome = choose(listing, policy)
    if isinstance(outcome, Conflict):
        return outcome.describe()
    if isinstance(outcome, Chosen | Unpinned) and outcome.group.weights_id != weights_id:
        return f"other weights became ready meanwhile: {_name(outcome.group)} beside {weights_id[:12]}"
    return ""


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
