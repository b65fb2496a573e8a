"""The answers of ``Find``, made from live slots. Pure.

A replica is offered only when every one of its ranks is published, READY, under one weights id, and none is
quarantined (hazards H42, H57, H58).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightwire.metadata.selection import order_offers, rank
from weightwire.metadata.slots import Slot
from weightwire.metadata.standing import Standing, standing, unreliable_hosts
from weightwire.wire.bounds import COUNTS
from weightwire.wire.messages import (
    FindReplicas,
    FindShard,
    LoadingReplica,
    OtherReplica,
    PublicationRecord,
    PublicationState,
    Rejection,
    ReplicaListing,
    ReplicaOffer,
    ShardListing,
    WeightsGroup,
)

_S = PublicationState
_PROGRESS = (_S.LOADING, _S.RELAYING, _S.HELD, _S.PAUSED, _S.READY)
"""From the least advanced state of a replica's ranks to the most."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of a replica: its slot, its record (never None), and what speaks against it."""

    slot: Slot
    record: PublicationRecord
    view: Standing


@dataclass(frozen=True, slots=True)
class Replica:
    """All live ranks of one life of one replica, one per shard key, in order of their keys."""

    ranks: tuple[Rank, ...]

    @property
    def first(self) -> PublicationRecord:
        """The record that speaks for what all ranks share."""
        return self.ranks[0].record

    @property
    def arrival(self) -> int:
        """When its first rank registered."""
        return min(rank.slot.arrival for rank in self.ranks)

    @property
    def state(self) -> PublicationState:
        """The least advanced of its ranks'."""
        return min((rank.record.state for rank in self.ranks), key=_PROGRESS.index)

    @property
    def suspect(self) -> bool:
        """Any rank is."""
        return any(rank.view.suspect for rank in self.ranks)

    @property
    def complete(self) -> bool:
        """As many ranks as there must be."""
        return len(self.ranks) == self.first.world_size

    @property
    def following(self) -> str:
        """What all ranks follow, itself if it reads a disk; "" if they do not."""
        named = {rank.record.following for rank in self.ranks}
        return named.pop() if len(named) == 1 else ""

    @property
    def followable(self) -> bool:
        """Whether every rank offers what is final of it, before the whole has its ids."""
        offers = all(rank.record.state.readable and not rank.view.quarantine for rank in self.ranks)
        return self.complete and offers and bool(self.following)

    def flaw(self) -> str:
        """Why it cannot be taken; "" if it can."""
        sizes = {rank.record.world_size for rank in self.ranks}
        if len(sizes) > 1:
            return f"its ranks name different world sizes: {sorted(sizes)}"
        if not self.complete:
            return f"only {len(self.ranks)} of {self.first.world_size} ranks have published"
        for each in self.ranks:
            if each.view.quarantine:
                return f"rank {each.record.coordinates.label()} is quarantined: {each.view.quarantine}"
        if self.state is not _S.READY:
            return f"not ready: {self.state}"
        if len({rank.record.weights_id for rank in self.ranks}) > 1:
            return "its ranks name different weights ids"
        return ""


def replicas(slots: Iterable[Slot]) -> list[Replica]:
    """Live slots as replicas, in the order in which they arrived."""
    live = [slot for slot in slots if slot.record is not None]
    unreliable = unreliable_hosts(live)
    found: defaultdict[tuple[str, str], dict[str, Rank]] = defaultdict(dict)
    for slot in sorted(live, key=lambda slot: (slot.arrival, slot.key)):
        assert slot.record is not None
        whole = found[slot.record.replica_key, slot.record.replica_incarnation]
        whole[slot.shard_key] = Rank(slot, slot.record, standing(slot, unreliable))  # a later process replaces
    made = [Replica(tuple(ranks[key] for key in sorted(ranks))) for ranks in found.values()]
    return sorted(made, key=lambda replica: replica.arrival)


def find_replicas(query: FindReplicas, slots: Sequence[Slot], now: float, warming_s: float) -> ReplicaListing:
    """See ``MetadataService.find_replicas``; ``slots`` are live and without expired reports."""
    everything = replicas(slots)
    asker = [r.arrival for r in everything if r.first.replica_incarnation == query.replica_incarnation]
    wanted = {key: place for place, key in enumerate(query.replica_keys)}
    offered: list[Replica] = []
    loading: list[LoadingReplica] = []
    others: list[OtherReplica] = []
    rejected: list[Rejection] = []
    for replica in everything:
        if replica.first.replica_incarnation == query.replica_incarnation:
            continue
        if replica.first.replica_key not in wanted:
            if replica.first.model_id == query.model_id or replica.first.family_key in query.family_keys:
                others.append(_other(replica))
            continue
        flaw = replica.flaw()
        if not flaw:
            offered.append(replica)
            continue
        rejected.append(Rejection(subject=f"replica {replica.first.replica_incarnation}", reason=flaw))
        if replica.state is not _S.READY or not replica.complete:
            loading.append(_loading(replica, now, min(asker, default=None)))
    return ReplicaListing(
        groups=_groups(offered, wanted)[: COUNTS["groups"]],
        loading=tuple(loading[: COUNTS["loading"]]),
        others=tuple(_family_first(others, query)[: COUNTS["others"]]),
        rejected=tuple(rejected[: COUNTS["rejected"]]),
        warming_s=warming_s,
    )


def _family_first(others: Sequence[OtherReplica], query: FindReplicas) -> list[OtherReplica]:
    """What could be resharded is not crowded out by what could not."""
    return sorted(others, key=lambda other: (other.family_key not in query.family_keys, other.state is not _S.READY))


def find_shard(query: FindShard, slots: Sequence[Slot]) -> ShardListing:
    """See ``MetadataService.find_shard``; ``slots`` are live and without expired reports."""
    usable: list[tuple[Slot, Standing]] = []
    rejected: list[Rejection] = []
    asker = next((slot for slot in slots if slot.key == (query.shard_key, query.asker)), None)
    place, begun = None if asker is None else asker.relayed or None, asker is not None and _begun(asker)
    for replica in replicas(slots):
        for rank_ in replica.ranks:
            record = rank_.record
            if record.shard_key != query.shard_key or record.incarnation in query.exclude:
                continue
            flaw = _shard_flaw(query, replica, rank_)
            if flaw:
                rejected.append(Rejection(subject=f"process {record.incarnation}", reason=flaw))
            else:
                usable.append((rank_.slot, rank_.view))
    return ShardListing(
        candidates=tuple(rank(usable, place, begun=begun)[: COUNTS["candidates"]]),
        rejected=tuple(rejected[: COUNTS["rejected"]]),
    )


def _begun(slot: Slot) -> bool:
    return slot.record is not None and slot.record.fraction > 0


def _shard_flaw(query: FindShard, replica: Replica, rank_: Rank) -> str:
    record = rank_.record
    if query.following:
        if record.following != query.following:
            return f"does not follow {query.following[:12]}"
    elif record.weights_id != query.weights_id or not record.weights_id:
        return f"holds other weights: {record.weights_id[:12] or 'not known yet'}"
    if not record.state.readable:
        return f"not readable: {record.state}"
    if rank_.view.quarantine:
        return f"quarantined: {rank_.view.quarantine}"
    # a relay speaks for itself: its weights were decided by all its ranks before it had any
    if record.state is _S.READY and not replica.complete:
        return f"only {len(replica.ranks)} of {record.world_size} ranks of its replica are there"
    return ""


def _groups(offered: Iterable[Replica], wanted: Mapping[str, int]) -> tuple[WeightsGroup, ...]:
    found: defaultdict[tuple[str, str], list[Replica]] = defaultdict(list)
    for replica in offered:
        found[replica.first.replica_key, replica.first.weights_id].append(replica)
    groups = [_group(members) for members in found.values()]
    return tuple(sorted(groups, key=lambda g: (wanted[g.replica_key], -g.ordinal, g.weights_id)))


def _group(members: Sequence[Replica]) -> WeightsGroup:
    first = members[0].first
    revisions = sorted({member.first.revision for member in members if member.first.revision})
    return WeightsGroup(
        replica_key=first.replica_key,
        stage=first.stage,
        weights_id=first.weights_id,
        ordinal=max(member.first.ordinal for member in members),
        revisions=tuple(revisions[: COUNTS["revisions"]]),
        replicas=order_offers(_offer(member) for member in members)[: COUNTS["replicas"]],
    )


def _offer(replica: Replica) -> ReplicaOffer:
    first = replica.first
    return ReplicaOffer(
        replica_key=first.replica_key,
        replica_incarnation=first.replica_incarnation,
        stage=first.stage,
        revision=first.revision,
        ordinal=first.ordinal,
        world_size=first.world_size,
        nbytes=sum(rank.record.nbytes for rank in replica.ranks),
        suspect=replica.suspect,
        reports=sum(rank.view.reports for rank in replica.ranks),
        active_reads=sum(rank.record.active_reads for rank in replica.ranks),
    )


def _loading(replica: Replica, now: float, asker: int | None) -> LoadingReplica:
    first = replica.first
    return LoadingReplica(
        replica_key=first.replica_key,
        replica_incarnation=first.replica_incarnation,
        stage=first.stage,
        revision=first.revision,
        state=replica.state,
        weights_id=first.weights_id,
        world_size=first.world_size,
        ranks=len(replica.ranks),
        fraction=min(rank.record.fraction for rank in replica.ranks) if replica.complete else 0.0,
        bytes_done=sum(rank.record.bytes_done for rank in replica.ranks),
        nbytes=sum(rank.record.nbytes for rank in replica.ranks),
        elapsed_s=max(0.0, now - min(rank.slot.arrived_at for rank in replica.ranks)),
        quiet_s=max(0.0, now - max(rank.slot.progressed_at for rank in replica.ranks)),
        live=not replica.suspect,
        earlier=asker is None or replica.arrival < asker,
        followable=replica.followable,
        following=replica.following,
    )


def _other(replica: Replica) -> OtherReplica:
    first = replica.first
    return OtherReplica(
        replica_key=first.replica_key,
        family_key=first.family_key,
        replica_incarnation=first.replica_incarnation,
        stage=first.stage,
        role=first.role,
        state=replica.state,
        revision=first.revision,
        world_size=first.world_size,
        ranks=len(replica.ranks),
        identity=first.identity,
    )
