"""Find: one question by the leader rank, one decision for all, then each rank's manifest."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightwire.errors import (
    AuthError,
    ConfigError,
    DecisionError,
    MetadataError,
    MetadataUnreachable,
    NoSourceError,
    ProtocolError,
    TransferError,
    WeightsConflict,
    WeightwireError,
)
from weightwire.identity.identity import Identity
from weightwire.manifest.offered import Offered
from weightwire.manifest.reshard import MAX_RANKS
from weightwire.metadata.decision import Group
from weightwire.metadata.selection import (
    Chosen,
    Conflict,
    Nothing,
    Outcome,
    Policy,
    Unpinned,
    Warming,
    choose,
    to_follow,
)
from weightwire.observability.progress import Progress
from weightwire.target.offer import Choice, Offer, Want
from weightwire.target.reader import Reader
from weightwire.target.relatives import relatives
from weightwire.target.session import contact
from weightwire.types import Coordinates, Json, Stage
from weightwire.wire.messages import (
    Candidate,
    FindReplicas,
    FindShard,
    LoadingReplica,
    ManifestHeader,
    PublicationState,
)

log = logging.getLogger(__name__)

POLL_S = 0.25
"""Between two looks at a replica that is still loading."""

QUIET_S = 20.0
"""A loading replica may construct its model for so long without a byte moving."""

HELD_QUIET_S = 180.0
"""A replica that has its bytes may warm up and capture graphs for so long before it offers them."""

MARGIN_S = 30.0
"""What the other ranks wait longer than the leader may take."""

MISSES = {
    kind.__name__: kind
    for kind in (
        NoSourceError,
        WeightsConflict,
        MetadataError,
        MetadataUnreachable,
        AuthError,
        ConfigError,
        DecisionError,
    )
}
"""How a miss is named in the decision, so that every rank raises the same."""


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """Asks, decides and fetches manifests for one load of one rank."""

    reader: Reader
    want: Want
    group: Group
    progress: Progress

    def choose(self) -> Choice:
        """What all ranks take.

        Raises:
            NoSourceError: nothing that can be taken is ready; says why, and what exists otherwise.
            WeightsConflict: several weights ids are ready and none was pinned.
            MetadataError: the metadata server cannot be reached or refuses.
        """
        if self.group.rank == 0:
            return _choice(self.group.once("choice", self._ask()))
        bound = self.reader.wait_for_loading_s + MARGIN_S
        return _choice(self.group.follow("choice", bound, _miss(DecisionError("rank 0 did not choose in time"))))

    def offer(self, choice: Choice) -> Offer:
        """This rank's part of ``choice``.

        Raises:
            NoSourceError: nobody serves this rank's shard of these weights.
            TransferError: those who do cannot be reached, or sent something out of bounds.
        """
        shard_key = self.want.stages[choice.stage].shard_key(self.want.coordinates)
        listing = self.reader.metadata.find_shard(
            FindShard(
                shard_key=shard_key,
                weights_id=choice.weights_id,
                exclude=(self.reader.incarnation,),
                asker=self.reader.incarnation,
                following=choice.follow,
            )
        )
        last: WeightwireError = NoSourceError(
            f"nobody serves {self.want.coordinates.label()} of {self.want.identity.model_id}", "see: weightwire sources"
        )
        for candidate in listing.candidates:
            try:
                header, offered = fetch_manifest(self.reader, candidate, choice, self.want.coordinates)
            except (TransferError, AuthError) as error:
                log.warning("%s", error)
                last = error
                continue
            return Offer(choice=choice, header=header, offered=offered, origin=candidate, candidates=listing.candidates)
        raise last

    def _ask(self) -> Json:
        try:
            return self._wait_for_choice().to_json()
        except WeightwireError as error:  # whatever it is, the other ranks learn of it now
            return _miss(error)

    def _wait_for_choice(self) -> Choice:
        until = time.monotonic() + self.reader.wait_for_loading_s
        while True:
            outcome = choose(self.reader.metadata.find_replicas(self.query), self.policy)
            sizes: Mapping[str, int] = {}
            followed = self._followed(outcome) if time.monotonic() < until else None
            if followed is not None:
                return followed
            if isinstance(outcome, Nothing) and (time.monotonic() >= until or not self._patient(outcome)):
                outcome, sizes = self._relative(outcome)
            if isinstance(outcome, Chosen):
                group = outcome.group
                return Choice(
                    stage=group.stage,
                    replica_key=group.replica_key,
                    weights_id=group.weights_id,
                    source_tp=sizes.get(group.replica_key, 0),
                )
            if time.monotonic() >= until or not self._patient(outcome):
                raise _error(outcome, self.want.identity)
            time.sleep(POLL_S)

    def _followed(self, outcome: Outcome) -> Choice | None:
        """A replica that is still reading its disk, to be followed instead of waited for."""
        if not isinstance(outcome, Nothing):
            return None
        wanted = {identity.replica_key for identity in self.want.stages.values()}
        found = to_follow(
            (item for item in outcome.loading if item.replica_key in wanted), self.policy, self.reader.stall_s
        )
        if found is None:
            return None
        log.info("following replica %s, which is still reading its disk", found.replica_incarnation[:8])
        return Choice(stage=found.stage, replica_key=found.replica_key, weights_id="", follow=found.replica_incarnation)

    def _relative(self, nothing: Nothing) -> tuple[Outcome, Mapping[str, int]]:
        """What could be resharded instead, and the tensor-parallel sizes by replica key."""
        sizes = relatives(self.want, nothing.others)
        if not sizes:
            return nothing, sizes
        query = FindReplicas(replica_keys=tuple(sizes), replica_incarnation=self.want.replica_incarnation)
        outcome = choose(self.reader.metadata.find_replicas(query), self.policy)
        return (nothing if isinstance(outcome, Nothing) else outcome), sizes

    @property
    def query(self) -> FindReplicas:
        """Which replicas would do."""
        identities = self.want.stages.values()
        return FindReplicas(
            replica_keys=tuple(identity.replica_key for identity in identities),
            family_keys=tuple(identity.family_key for identity in identities),
            model_id=self.want.identity.model_id,
            replica_incarnation=self.want.replica_incarnation,
        )

    @property
    def policy(self) -> Policy:
        """What the operator demands."""
        return Policy(
            weights_id=self.want.pinned,
            revision=self.want.identity.revision or "",
            accept_unpinned=self.want.accept_unpinned,
            latest=self.want.latest,
        )

    def _patient(self, outcome: Outcome) -> bool:
        """Whether asking again soon can help: a conflict may be hidden, or an earlier replica is getting there."""
        if isinstance(outcome, Warming):
            return True
        if not isinstance(outcome, Nothing):
            return False
        if outcome.warming_s > 0 and not self.want.has_disk:
            return True
        ahead = [item for item in outcome.loading if item.earlier and item.live and item.quiet_s <= self._quiet(item)]
        if ahead:
            self.progress("wait", int(max(item.fraction for item in ahead) * 100), 100, "percent")
        return bool(ahead)

    def _quiet(self, item: LoadingReplica) -> float:
        return HELD_QUIET_S if item.state is PublicationState.HELD else max(QUIET_S, self.reader.stall_s)


def fetch_manifest(
    reader: Reader, candidate: Candidate, choice: Choice, coordinates: Coordinates
) -> tuple[ManifestHeader, Offered]:
    """A candidate's manifest, checked to be of what was chosen; not taken apart.

    Raises:
        TransferError: it cannot be reached, moved on, or offers something else than it published.
        AuthError: it does not hold our secret.
    """
    client = contact(reader, candidate)
    try:
        header, found = client.manifest(candidate.record.shard_key, timeout=reader.load_s)
    finally:
        client.close()
    agreed = [choice.stage, coordinates]
    offered: list[object] = [header.stage, header.coordinates]
    if not choice.follow:  # ids of what is followed become known while it is read
        agreed += [choice.weights_id, candidate.record.content_id]
        offered += [header.weights_id, header.content_id]
    if offered != agreed:
        raise ProtocolError(f"{client.target} offers something else than it published", "another source is tried")
    return header, found


def give_up(group: Group, error: WeightwireError) -> None:
    """This rank cannot even ask: tell the others, who would wait for it. Legal before ``Discovery.choose``."""
    if group.rank == 0:
        group.once("choice", _miss(error))
    group.refuse("plan", error.problem)


def _error(outcome: Outcome, wanted: Identity) -> WeightwireError:
    match outcome:
        case Conflict():
            return WeightsConflict(outcome.describe(), "pin one by its weights id or revision, or ask for the latest")
        case Unpinned():
            return NoSourceError(outcome.describe(), "name a revision or a weights id, or accept unpinned ones")
        case Warming():
            return NoSourceError("the metadata server has just started and may not know all sources", "ask again soon")
        case Nothing():
            differing = _differing(outcome, wanted)
            return NoSourceError(f"no source: {outcome.describe()}{differing}", "start one, or see: weightwire sources")
        case _:
            raise AssertionError(outcome)


def _differing(outcome: Nothing, wanted: Identity) -> str:
    """In which fields the first replica of this model that exists otherwise differs from what is wanted."""
    for other in outcome.others:
        try:
            theirs = json.loads(other.identity)
        except ValueError:  # not from us: nothing is trusted, and nothing is said
            continue
        if isinstance(theirs, dict):
            ours, theirs = _flat(json.loads(wanted.canonical_json())), _flat(theirs)
            keys = [key for key in ours if ours[key] != theirs.get(key)]
            said = ", ".join(f"{key} {str(ours[key])[:32]} here, {str(theirs.get(key))[:32]} there" for key in keys[:3])
            return f" ({said})" if said else ""
    return ""


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    sizes = fields.get("sizes")
    return fields | (sizes if isinstance(sizes, dict) else {}) | {"sizes": None}


def _miss(error: WeightwireError) -> dict[str, Json]:
    kind = type(error).__name__
    return {"miss": kind if kind in MISSES else "MetadataError", "problem": error.problem, "remedy": error.remedy}


def _choice(recorded: Json) -> Choice:
    match recorded:
        case {"stage": str(stage), "replica_key": str(key), "weights_id": str(weights), **more}:
            size, follow = more.get("source_tp", 0), more.get("follow", "")
            if isinstance(size, int) and 0 <= size <= MAX_RANKS and isinstance(follow, str):
                return Choice(stage=Stage(stage), replica_key=key, weights_id=weights, source_tp=size, follow=follow)
        case {"miss": str(kind), "problem": str(problem), "remedy": str(remedy)} if kind in MISSES:
            raise MISSES[kind](problem, remedy)
    raise DecisionError("a recorded choice is malformed", "do all ranks run the same version?")
