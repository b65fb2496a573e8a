"""What the control plane says, as plain frozen values: no protobuf, no gRPC, no torch.

``codec`` turns them into protobuf and back and checks every bound; nothing here trusts or checks anything. Text ids
(keys, incarnations, content and weights ids) are opaque here: they are compared, never interpreted. ``""`` stands for
"none" or "not known yet" in every text field.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from weightwire.types import Coordinates, Json, Role, Stage


class PublicationState(enum.StrEnum):
    """Where a publication stands; see ``metadata.lifecycle`` for how it moves."""

    LOADING = "LOADING"
    """Bytes are still coming from a disk; nothing can be read."""
    HELD = "HELD"
    """Leased and digested, not offered until the engine says that it may be read."""
    RELAYING = "RELAYING"
    """Still filling, from a peer or (then without ids) from a disk; the leaves that are final can be read."""
    READY = "READY"
    """All leaves can be read."""
    PAUSED = "PAUSED"
    """Not offered for the moment (graph capture, sleep, an update); its generation moves."""
    WITHDRAWN = "WITHDRAWN"
    """Over; never comes back under the same generation."""

    @property
    def readable(self) -> bool:
        """Whether a reader may be sent there."""
        return self in (PublicationState.READY, PublicationState.RELAYING)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicationRecord:
    """One rank's shard as its source describes it: small, never bytes, never a manifest.

    One atomic record per (``shard_key``, ``incarnation``): ranks cannot overwrite each other's.

    Attributes:
        shard_key: replica key and full coordinates, hashed.
        replica_key, family_key: identity with and without parallel sizes, hashed.
        model_id: the operator's model id or the Hub id, for listings and for "the same model at another stage".
        identity: canonical JSON of the identity, for explaining mismatches; never trusted as a key.
        revision: Hub commit or the operator's label; "" when the source does not know it.
        coordinates, role, stage: where this rank stands, of which model, and when its bytes were taken.
        incarnation: uuid of the process life that serves it.
        replica_incarnation: uuid that all ranks of one replica share for one life.
        world_size: how many shards make the replica complete.
        endpoints: ``host:port`` of the peer endpoint, best first; at least one unless ``LOADING``.
        content_id: digest of this shard's weights; "" until known.
        weights_id: digest over the content ids of all ranks; "" until gathered.
        ordinal: the operator's ordering of weights for ``latest``; relays pass it on unchanged.
        nbytes: length of the shard's logical byte string; 0 until known.
        state: see :class:`PublicationState`.
        generation: counter of the published bytes; never goes back within an incarnation.
        sequence: counter of what the source said about this publication; a message with a lower one is late.
        host: stable id of the machine, for "two reporters on different hosts".
        fraction, bytes_done: how much of the shard is in place, from 0 to 1, and in bytes.
        active_reads: read leases that are open at the source right now.
        following: replica incarnation of the reader of a disk (itself, or another) whose leaves it offered or took
            before they had ids; "" where it never did that with these bytes.
    """

    shard_key: str
    replica_key: str
    family_key: str
    model_id: str
    identity: str
    revision: str = ""
    coordinates: Coordinates = field(default_factory=Coordinates)
    role: Role = Role.TARGET
    stage: Stage = Stage.LOADED
    incarnation: str
    replica_incarnation: str
    world_size: int = 1
    endpoints: tuple[str, ...] = ()
    content_id: str = ""
    weights_id: str = ""
    ordinal: int = 0
    nbytes: int = 0
    state: PublicationState = PublicationState.LOADING
    generation: int = 0
    sequence: int = 0
    host: str = ""
    fraction: float = 0.0
    bytes_done: int = 0
    active_reads: int = 0
    following: str = ""

    @property
    def reads_disk(self) -> bool:
        """Whether it may be read while it fills itself, and what it fills itself from is a disk."""
        return self.state is PublicationState.RELAYING and self.following == self.replica_incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The server's answer to a publish.

    ``lease_id`` names it in the ``Keep`` stream: made by the server, unknown after it restarts. The lease is gone
    ``ttl_s`` seconds after the last beat.
    """

    lease_id: str
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepUpdate:
    """One lease's part of a beat. Applied only if (generation, sequence) is not behind what the server has."""

    lease_id: str
    generation: int
    sequence: int
    state: PublicationState
    fraction: float = 0.0
    bytes_done: int = 0
    active_reads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What a source found when it digested one leaf again, because somebody had reported it."""

    lease_id: str
    leaf: int
    ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepBeat:
    """One message of the stream that keeps all leases of a process."""

    updates: tuple[KeepUpdate, ...]
    checks: tuple[CheckResult, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recheck:
    """The server asks a source to digest a leaf again."""

    lease_id: str
    leaf: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAnswer:
    """The answer to one beat.

    ``unknown``: lease ids that the server does not have: publish again what is still published. ``rechecks``: leaves to
    digest again; the results go into a later beat. ``ttl_s``: the server's TTL; a client beats every third of it.
    """

    unknown: tuple[str, ...]
    rechecks: tuple[Recheck, ...]
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """The end of a publication. ``generation`` is the one *after* the withdrawn bytes."""

    shard_key: str
    incarnation: str
    generation: int
    sequence: int


# ---- Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class FindReplicas:
    """The leader rank's one question: which whole replicas could we take our weights from?

    ``replica_keys``: the acceptable stages', in order of preference. ``family_keys`` (without parallel sizes) and
    ``model_id`` are for "exists otherwise". ``replica_incarnation``: the asker's own, left out of the answer.
    """

    replica_keys: tuple[str, ...]
    family_keys: tuple[str, ...] = ()
    model_id: str = ""
    replica_incarnation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOffer:
    """One complete replica: every rank published, with one weights id, and none of them is out of bounds.

    ``suspect``: its keeper's stream is broken or late; confirm by contact. ``reports``: against any of its ranks, not
    expired. ``active_reads``: over all ranks.
    """

    replica_key: str
    replica_incarnation: str
    stage: Stage
    revision: str
    ordinal: int
    world_size: int
    nbytes: int
    suspect: bool
    reports: int
    active_reads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsGroup:
    """All complete replicas that hold the same weights under one replica key.

    ``ordinal`` is the highest one that any of them was given; ``revisions`` are all that were named.
    """

    replica_key: str
    stage: Stage
    weights_id: str
    ordinal: int
    revisions: tuple[str, ...]
    replicas: tuple[ReplicaOffer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingReplica:
    """A replica that will be a source soon, if its lease lives and makes progress.

    Attributes:
        state: the least advanced state of its ranks; its ``weights_id`` is "" while it is not known.
        ranks: how many of ``world_size`` have registered.
        fraction: of the slowest rank.
        elapsed_s: since its first rank registered.
        quiet_s: since any of its ranks last made progress.
        live: no rank's keeper is suspect.
        earlier: registered before the asker did (or the asker did not register): only earlier ones are worth waiting
            for, so that two that start together never wait for each other.
        followable: every rank offers those leaves that are final, although its ids are not known yet.
        following: see :class:`PublicationRecord`; its own incarnation for one that reads a disk.
    """

    replica_key: str
    replica_incarnation: str
    stage: Stage
    revision: str
    state: PublicationState
    weights_id: str
    world_size: int
    ranks: int
    fraction: float
    bytes_done: int
    nbytes: int
    elapsed_s: float
    quiet_s: float
    live: bool
    earlier: bool
    followable: bool = False
    following: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherReplica:
    """Something of the same model or family that was not asked for: another stage, layout, or quantization."""

    replica_key: str
    family_key: str
    replica_incarnation: str
    stage: Stage
    role: Role
    state: PublicationState
    revision: str
    world_size: int
    ranks: int
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why something that exists is not offered; one line."""

    subject: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaListing:
    """The answer to :class:`FindReplicas`; ``metadata.selection.choose`` makes a typed outcome of it.

    ``warming_s``: seconds for which the server, started empty, may still be missing sources; 0 once it is warm.
    """

    groups: tuple[WeightsGroup, ...]
    loading: tuple[LoadingReplica, ...] = ()
    others: tuple[OtherReplica, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    warming_s: float = 0.0

    @property
    def warming(self) -> bool:
        """Whether a conflict may still be hidden."""
        return self.warming_s > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FindShard:
    """One rank's question: who serves my shard of these weights?

    Attributes:
        shard_key: of the shard.
        weights_id: of the replica that it belongs to.
        exclude: incarnations that the asker does not want (itself, peers that failed it).
        asker: its incarnation, which gives it its place among the relays. Empty for one that serves nobody.
        following: instead of weights, a replica incarnation: whoever follows it, itself included.
    """

    shard_key: str
    weights_id: str
    exclude: tuple[str, ...] = ()
    asker: str = ""
    following: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A source of one shard, with the reason for its place in the order.

    ``seated``: read from it now, at the same time as from the others that are; the rest are for when one of them fails.
    It is then the one to ask for every ``parts``-th chunk from number ``part`` on; where ``parts`` is 0, for what lags.
    """

    record: PublicationRecord
    reason: str
    suspect: bool = False
    reports: int = 0
    seated: bool = False
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardListing:
    """Candidates, best first."""

    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...] = ()


# ---- Peer endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """What a source says of one of its shards, asked before a byte is planned and before anyone is blamed."""

    shard_key: str
    incarnation: str
    generation: int
    state: PublicationState
    content_id: str
    derived_id: str
    weights_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestHeader:
    """What goes with a manifest and comes before it on the stream; without ids where the manifest is provisional.

    ``build_facts`` is what the source's construction learnt from its checkpoint files; the target applies it first.
    """

    shard_key: str
    incarnation: str
    generation: int
    content_id: str
    derived_id: str
    weights_id: str
    stage: Stage
    role: Role
    coordinates: Coordinates
    revision: str = ""
    ordinal: int = 0
    build_facts: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRead:
    """A reader asks for the right to read one generation of one shard.

    Attributes:
        content_id: what the reader expects to find; anything else is refused.
        reader: the reading process's incarnation.
        reader_host: stable id of the reading machine.
        transports: names of the transports that the reader can use, best first.
        layout_digest: instead of a content id: read what has this layout, and be told its digests by ``Progress``.
    """

    shard_key: str
    incarnation: str
    content_id: str
    reader: str
    reader_host: str
    transports: tuple[str, ...]
    layout_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadGrant:
    """The right to read one generation, and how.

    Attributes:
        lease: opaque to the reader; presented to the transport and to ``Progress`` and ``CloseRead``.
        endpoints: transport name -> what ``Transport.describe`` gave, in the source's order of preference.
        ttl_s: the lease ends this long after the last sign of the reader (an open ``Progress`` stream is one).
        rate: bytes a second that the reader may take; 0 for no bound. One-sided readers keep to it by themselves.
    """

    lease: bytes
    generation: int
    ttl_s: float
    endpoints: Mapping[str, bytes]
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class LeafRange:
    """Leaves ``first`` to ``first + count - 1``."""

    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressUpdate:
    """Leaves that became readable since the update before.

    Attributes:
        version: give it as ``since`` to go on from here; 0 is the beginning.
        ranges: new ones only; empty in an update that merely shows that the source is alive.
        complete: every leaf is readable now; no further update need follow.
        generation: when it differs from the grant's, the lease is over.
        rate: takes the place of the grant's.
        digests: of the leaves of ``ranges``, one after the other, where the read was opened by its layout.
    """

    version: int
    generation: int
    ranges: tuple[LeafRange, ...] = ()
    complete: bool = False
    rate: float = 0.0
    digests: bytes = b""
