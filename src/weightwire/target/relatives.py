"""Which other replicas hold the same weights, cut for another number of tensor-parallel ranks. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from weightwire.manifest.reshard import MAX_RANKS
from weightwire.target.offer import Want
from weightwire.types import Stage
from weightwire.wire.messages import OtherReplica, PublicationState

MAX_RELATIVES = 16


def relatives(want: Want, others: Iterable[OtherReplica]) -> dict[str, int]:
    """Replica key -> tensor-parallel size of what could be resharded, the most ranks first.

    A key is taken only if it is the one that our own identity has at that size: nothing that is listed is trusted.
    """
    ours = want.stages.get(Stage.LOADED)
    if not want.reshard or ours is None or max(ours.pp_size, ours.ep_size, ours.dp_size) > 1:
        return {}
    found: dict[str, int] = {}
    for other in others:
        ready = other.stage is Stage.LOADED and other.state is PublicationState.READY
        if other.family_key != ours.family_key or not ready or not 1 <= other.world_size <= MAX_RANKS:
            continue
        there = dataclasses.replace(ours, tp_size=other.world_size)
        if there.replica_key == other.replica_key != ours.replica_key:
            found[other.replica_key] = other.world_size
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return dict(ordered[:MAX_RELATIVES])
