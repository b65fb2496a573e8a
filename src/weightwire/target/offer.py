"""What is asked for, what the metadata server has, and what was agreed on: before any byte, before construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightwire.identity.identity import Identity
from weightwire.manifest.records import Manifest
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
    """

    stages: Mapping[Stage, Identity]
    coordinates: Coordinates
    pinned: str = ""
    latest: bool = False
    accept_unpinned: bool = False
    replica_incarnation: str = ""
    has_disk: bool = True

    @property
    def identity(self) -> Identity:
        """The one of the preferred stage."""
        return next(iter(self.stages.values()))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What all ranks take: one replica key's weights."""

    stage: Stage
    replica_key: str
    weights_id: str

    def to_json(self) -> dict[str, Json]:
        """For the decision store."""
        return {"stage": self.stage.value, "replica_key": self.replica_key, "weights_id": self.weights_id}


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What this rank can take: the manifest of its shard, and who serves it.

    Attributes:
        choice: what was decided for all ranks.
        header: goes with the manifest; ``header.build_facts`` are applied before construction.
        manifest: of this rank's shard.
        origin: who gave the manifest.
        candidates: everybody who serves this shard of these weights, best first.
    """

    choice: Choice
    header: ManifestHeader
    manifest: Manifest
    origin: Candidate
    candidates: tuple[Candidate, ...]
