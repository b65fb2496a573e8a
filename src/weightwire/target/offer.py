"""What is asked for, what the metadata server has, and what was agreed on: before any byte, before construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightwire.identity.identity import Identity
from weightwire.manifest.offered import Offered
from weightwire.manifest.provisional import Expected, Provisional
from weightwire.manifest.records import Manifest
from weightwire.manifest.reshard import MAX_AMPLIFICATION
from weightwire.types import Coordinates, Json, Stage
from weightwire.wire.messages import Candidate, ManifestHeader


@dataclass(frozen=True, kw_only=True)
class Want:
    """What one rank of a target asks for.

    Attributes:
        identity: of the model; its ``stage`` field is replaced by each of ``stages`` in turn.
        stages: identities by acceptable stage, preferred first.
        coordinates: this rank's.
        pinned: a weights id; nothing else is taken.
        latest: where several weights ids are ready, take the one with the highest ordinal.
        accept_unpinned: take any revision where the identity names none.
        replica_incarnation: this replica's own, if it announced itself, so that it never waits for itself.
        has_disk: there is another way to the weights; without one it is worth waiting for a server that is warming up.
        reshard: where nothing of the own parallel sizes is there, take raw bytes of another tensor-parallel size.
        max_amplification: bytes read over bytes needed, at most, where that is done.
    """

    stages: Mapping[Stage, Identity]
    coordinates: Coordinates
    pinned: str = ""
    latest: bool = False
    accept_unpinned: bool = False
    replica_incarnation: str = ""
    has_disk: bool = True
    reshard: bool = False
    max_amplification: float = MAX_AMPLIFICATION

    @property
    def identity(self) -> Identity:
        """The one of the preferred stage."""
        return next(iter(self.stages.values()))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What all ranks take: one replica key's weights.

    Attributes:
        source_tp: tensor-parallel size of that replica where it is not ours, else 0.
        follow: replica incarnation of a reader of a disk that is followed. Then there is no weights id yet: all ranks
            take from ranks of that one replica, or of those who follow it, and check at the end what it was.
    """

    stage: Stage
    replica_key: str
    weights_id: str
    source_tp: int = 0
    follow: str = ""

    def to_json(self) -> dict[str, Json]:
        """For the decision store."""
        plain: dict[str, Json] = {"stage": self.stage.value, "replica_key": self.replica_key}
        plain["weights_id"] = self.weights_id
        if self.source_tp:
            plain["source_tp"] = self.source_tp
        if self.follow:
            plain["follow"] = self.follow
        return plain


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank of a source with another tensor-parallel size: its manifest, and who serves it, best first."""

    header: ManifestHeader
    offered: Offered
    candidates: tuple[Candidate, ...]

    @property
    def manifest(self) -> Manifest:
        """Taken apart; raises as ``Offered.manifest``, the first time."""
        return self.offered.manifest


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What this rank can take: the manifest of its shard, and who serves it.

    Attributes:
        choice: what was decided for all ranks.
        header: goes with the manifest; ``header.build_facts`` are applied before construction.
        offered: the manifest of this rank's shard, as it came.
        origin: who gave the manifest.
        candidates: everybody who serves this shard of these weights, best first.
        shards: of all ranks of a source with another tensor-parallel size, in rank order; else empty. ``header``,
            ``offered``, ``origin`` and ``candidates`` are those of its rank 0.
        agreed: the manifest, once it was compared with our own layout.
        provisional: what ``manifest`` becomes, where a replica is followed; made once the layouts were compared.
    """

    choice: Choice
    header: ManifestHeader
    offered: Offered
    origin: Candidate
    candidates: tuple[Candidate, ...]
    shards: tuple[Shard, ...] = ()
    agreed: Manifest | None = None
    provisional: Provisional | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest; before it was agreed on it is taken apart, and that raises as ``Offered.manifest``."""
        return self.agreed or self.offered.manifest

    @property
    def expected(self) -> Expected:
        """What is verified against."""
        return self.provisional or self.manifest
