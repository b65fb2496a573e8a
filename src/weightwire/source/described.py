"""What a publication is of, what it holds, and how that is told to peers and to the metadata server. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from weightwire.identity.identity import Identity
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.availability import Availability
from weightwire.manifest.provisional import Provisional
from weightwire.manifest.records import DIGEST_BYTES, Manifest
from weightwire.metadata.lifecycle import Life
from weightwire.types import Coordinates, Json
from weightwire.wire.messages import ManifestHeader, OpenRead, PeerStatus, ProgressUpdate, PublicationRecord


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a publication is of: fixed for its life.

    Attributes:
        identity: at the stage of its bytes.
        coordinates: this rank's.
        world_size: ranks of the replica.
        replica_incarnation: one life of the replica; equal on all its ranks.
        ordinal: the operator's ordering of weights.
        build_facts: what construction learnt from the checkpoint.
    """

    identity: Identity
    coordinates: Coordinates
    world_size: int
    replica_incarnation: str
    ordinal: int = 0
    build_facts: Mapping[str, Json] = field(default_factory=dict)

    @property
    def shard_key(self) -> str:
        """The key that it is found under."""
        return self.identity.shard_key(self.coordinates)


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What a publication serves.

    Attributes:
        manifest: what the bytes are.
        memory: where they are; keeps them alive.
        weights_id: of the whole replica; empty while it is not known.
        provisional: the digests as they become known, of what is being read from a disk, first hand or not; its
            ``manifest`` is a provisional one.
        following: the replica incarnation that reads or read that disk.
    """

    manifest: Manifest
    memory: AddressSpace
    weights_id: str
    provisional: Provisional | None = None
    following: str = ""

    @property
    def content_id(self) -> str:
        """Of what is held; empty while it is not known."""
        return "" if self.manifest.provisional else self.manifest.content_id

    @property
    def derived_id(self) -> str:
        """Likewise."""
        return "" if self.manifest.provisional else self.manifest.derived_id

    def digests(self, first: int, count: int) -> bytes:
        """Of ``count`` leaves from ``first`` on, which are there."""
        if self.provisional is not None and self.manifest.provisional:
            return self.provisional.between(first, count)
        return self.manifest.digests[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]

    def fits(self, request: OpenRead) -> bool:
        """Whether ``request`` means what is held: the same content, or the same layout where that is asked for."""
        if request.layout_digest:
            return bool(self.following) and request.layout_digest == self.manifest.layout.digest
        return bool(self.content_id) and request.content_id == self.content_id


@dataclass(frozen=True, slots=True)
class Where:
    """The process that serves: its incarnation, its host's id, and its endpoints."""

    incarnation: str
    host: str
    endpoints: tuple[str, ...]


def same(before: Holding, after: Holding) -> bool:
    """Whether readers of the one may go on as readers of the other: the same bytes at the same places."""
    if before.manifest.provisional:
        growing = before.provisional
        known = growing is not None and growing.complete and growing.manifest() == after.manifest
    else:
        ids = [(each.manifest.content_id, each.manifest.derived_id, each.weights_id) for each in (before, after)]
        known = ids[0] == ids[1]
    return known and before.memory.lies_as(after.memory)


def filling(record: PublicationRecord, available: Availability) -> PublicationRecord:
    """``record`` of a shard of which only ``available`` is there."""
    done = int(record.nbytes * available.fraction)
    return dataclasses.replace(record, fraction=available.fraction, bytes_done=done)


def from_disk(claim: Claim, memory: AddressSpace, provisional: Provisional) -> Holding:
    """What a publication of ``claim`` relays while a disk is read into ``memory``: no ids, and itself followed."""
    outline = Manifest(layout=provisional.layout, digests=b"")
    return Holding(
        manifest=outline,
        memory=memory,
        weights_id="",
        provisional=provisional,
        following=claim.replica_incarnation,
    )


def told(update: ProgressUpdate, holding: Holding | None) -> ProgressUpdate:
    """``update`` with the digests of its leaves; as it is where there is no holding to tell them of."""
    if holding is None:
        return update
    return dataclasses.replace(
        update, digests=b"".join(holding.digests(each.first, each.count) for each in update.ranges)
    )


def status(claim: Claim, holding: Holding | None, life: Life, incarnation: str) -> PeerStatus:
    """See ``PeerService.status``."""
    return PeerStatus(
        shard_key=claim.shard_key,
        incarnation=incarnation,
        generation=life.generation,
        state=life.state,
        content_id=holding.content_id if holding else "",
        derived_id=holding.derived_id if holding else "",
        weights_id=holding.weights_id if holding else "",
    )


def header(claim: Claim, holding: Holding, life: Life, incarnation: str) -> ManifestHeader:
    """What goes with the manifest."""
    return ManifestHeader(
        shard_key=claim.shard_key,
        incarnation=incarnation,
        generation=life.generation,
        content_id=holding.content_id,
        derived_id=holding.derived_id,
        weights_id=holding.weights_id,
        stage=claim.identity.stage,
        role=claim.identity.role,
        coordinates=claim.coordinates,
        revision=claim.identity.revision or "",
        ordinal=claim.ordinal,
        build_facts=dict(claim.build_facts),
    )


def record(
    claim: Claim, holding: Holding | None, life: Life, where: Where, loaded: tuple[int, int], readers: int
) -> PublicationRecord:
    """What the metadata server is told.

    Args:
        claim: what it is of.
        holding: ``None`` while it is loading.
        life: state, generation and sequence.
        where: who serves it.
        loaded: bytes in place and bytes in all, while it is loading.
        readers: open read leases.
    """
    identity, (done, total) = claim.identity, loaded
    told = PublicationRecord(
        shard_key=claim.shard_key,
        replica_key=identity.replica_key,
        family_key=identity.family_key,
        model_id=identity.model_id,
        identity=identity.canonical_json(),
        revision=identity.revision or "",
        coordinates=claim.coordinates,
        role=identity.role,
        stage=identity.stage,
        incarnation=where.incarnation,
        replica_incarnation=claim.replica_incarnation,
        world_size=claim.world_size,
        endpoints=where.endpoints,
        ordinal=claim.ordinal,
        state=life.state,
        generation=life.generation,
        sequence=life.sequence,
        host=where.host,
        fraction=min(1.0, done / total) if total else 0.0,
        bytes_done=done,
        nbytes=0,  # beats carry progress but no size: one that appeared while loading would stop them
        active_reads=readers,
    )
    if holding is None:
        return told
    nbytes = holding.manifest.layout.nbytes
    return dataclasses.replace(
        told,
        content_id=holding.content_id,
        weights_id=holding.weights_id,
        following=holding.following,
        nbytes=nbytes,
        bytes_done=nbytes,
        fraction=1.0,
    )
